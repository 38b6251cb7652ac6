"""Commands before a run: init, check, doctor, and the plan of `--max-minutes`."""
