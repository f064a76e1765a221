"""Score models on lm-eval benchmarks and decide, pairwise, whether a candidate may replace a reference."""
