"""Answers: how a model answers a benchmark, in processes of their own."""
