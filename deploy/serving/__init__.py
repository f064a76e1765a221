"""Serving: the champion behind one address."""
