"""Models as they come in: what a folder holds, how it is loaded, what it is worth beside simpler ones."""
