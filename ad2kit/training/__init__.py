"""From teacher to student: AD2, its losses, the training loop, and the selection of an update."""
