"""From tables to rows that train and judge: sources, labels, splits, windows."""
