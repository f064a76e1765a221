"""Where StopOnFile was before: trainers that import it from here are told that relex.callbacks has it."""

import warnings

from relex.callbacks import StopOnFile

__all__ = ["StopOnFile"]

warnings.warn(
    "flows.stop.callback is relex.callbacks now: import StopOnFile from there.", DeprecationWarning, stacklevel=2
)
