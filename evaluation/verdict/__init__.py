"""Verdict: what scores show, without a model.

report, samples   how one model did on one benchmark, and each of its answers
gate, bounds      whether a candidate is no worse than a reference, and the statistics of it
looks             how many comparisons there were at a gate, and the error each may spend
results           two stored results, whoever wrote them, paired and judged
differences       the problems on which two models differ
export            an evaluation as lm-eval's own command line writes it
"""
