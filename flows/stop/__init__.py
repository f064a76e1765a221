"""Stop: whether the training may end, what is asked about it, and the act."""
