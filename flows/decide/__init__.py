"""Decide: one window from its observed steps to a verdict, predicted, searched, gated and registered."""
