"""The demo: a real, tiny RLVR run."""
