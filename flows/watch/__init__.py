"""Watch: look at a run's checkpoint store, pin what a decision needs, and announce what is due."""
