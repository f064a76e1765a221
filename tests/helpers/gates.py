"""A gate that was passed, with numbers that a page and a record can be read for."""

from evaluation.verdict.gate import Gate

GATE = Gate(
    "relex @ 240", "last observed @ 48", "gate", 1000, 0.7, 0.4, 0.3, 0.27, 0.95, 0.0, "exact McNemar", "passed"
)
