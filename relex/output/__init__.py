"""Output: a predicted model as files, complete or absent."""
