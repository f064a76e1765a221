"""Backtest: how far a run's own observed steps can be trusted to extrapolate."""
