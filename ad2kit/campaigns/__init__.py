"""Many stages or many runs: run, compare, fit, sweep."""
