"""The HTTP service: batcher, connections, errors, monitoring, and the Bento that holds them."""
