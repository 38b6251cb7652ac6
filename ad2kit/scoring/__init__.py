"""Tables of any size through a classifier."""
