"""Models as they come in: their folders, loading, and what a teacher has to beat."""
