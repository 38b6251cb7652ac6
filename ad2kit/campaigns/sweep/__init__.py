"""Many configurations of one recipe, on Ray Tune."""
