"""Teacher to student: AD2, its losses, the one training loop, and which update is kept."""
