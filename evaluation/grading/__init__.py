"""Grading: whether an answer is right. Benchmarks name these functions in their YAML, and others' YAML does."""

from evaluation.grading.score import score_boxed_math, score_exact_match

__all__ = ["score_boxed_math", "score_exact_match"]
