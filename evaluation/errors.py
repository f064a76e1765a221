"""Errors of evaluation: one line each, the fact with names and both values, then the way out.

EvaluationError
├── ModelError        a directory that is no model this package may load
├── BenchmarkError    unknown, broken or changed, or too long for the model
├── BackendError      a backend that is unknown, not installed, or cannot do what is asked
├── DeviceError       a device this machine does not have
├── JournalError      a journal damaged anywhere but in its last line
├── ReportError       a file that is no report
├── WorkerError       the process that scores a model died or failed
├── ComparisonError   two reports that cannot be compared
└── OverlapError      two benchmarks that share problems and must not
"""


class EvaluationError(Exception):
    """Root of everything this package refuses or reports as failed."""


class ModelError(EvaluationError):
    """A directory that is no model this package may load."""


class BenchmarkError(EvaluationError):
    """A benchmark that is unknown, broken, changed, or too long for the model."""


class BackendError(EvaluationError):
    """A backend that is unknown, not installed, or cannot do what is asked."""


class DeviceError(EvaluationError):
    """A device this machine does not have."""


class JournalError(EvaluationError):
    """A journal damaged anywhere but in its last line."""


class ReportError(EvaluationError):
    """A file that is no report."""


class WorkerError(EvaluationError):
    """The process that scores a model died or failed."""


class ComparisonError(EvaluationError):
    """Two reports that cannot be compared."""


class OverlapError(EvaluationError):
    """Two benchmarks that share problems and must not."""
