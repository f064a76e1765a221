"""Where StopOnFile was at first: trainers that import it from here are told that relex.callbacks has it."""

import warnings

from relex.callbacks import StopOnFile

__all__ = ["StopOnFile"]

warnings.warn(
    "flows.stop_callback is relex.callbacks now: import StopOnFile from there.", DeprecationWarning, stacklevel=2
)
