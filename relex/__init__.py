"""Predict later checkpoints of an RLVR training run from the ones observed so far."""

__version__ = "0.1.0"
