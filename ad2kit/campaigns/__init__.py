"""Commands that drive several stages or several runs: run, compare, fit, sweep."""
