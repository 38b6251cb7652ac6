"""Texts and labels in, scores out: sources, splits, labels, metrics."""
