"""Models: checks of their folders, loading, and the baselines that a teacher has to beat."""
