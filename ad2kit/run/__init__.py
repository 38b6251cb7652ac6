"""A run: its recipe, folder, records and machine. Imports nothing else of ad2kit."""
