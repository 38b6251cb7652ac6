"""From texts and labels to scores: sources, splits, labels, metrics."""
