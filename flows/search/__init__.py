"""Search: which target, by scores: a ladder climbed from the nearest, then halving on ever more problems."""
