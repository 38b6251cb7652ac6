"""Answers over HTTP: the batcher, errors, monitoring, and the Bento."""
