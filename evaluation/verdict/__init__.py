"""Verdict: what the answers say, of one model and of one against another."""
