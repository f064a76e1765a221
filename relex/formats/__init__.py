"""Formats: the containers that tensors are stored in, read without executing anything."""
