"""Drift: what was predicted, compared with what the run reaches later."""
