"""Predict later checkpoints of an RLVR training run from the ones observed so far."""
