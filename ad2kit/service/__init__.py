"""The HTTP service: models, batcher, connections, errors, monitoring, settings."""
