"""Prefect flows that compose relex, evaluation and deploy, and the command line."""
