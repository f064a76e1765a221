"""Observed: real checkpoints as models that are scored, gated and registered like predictions."""
