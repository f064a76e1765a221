"""Where StopOnFile was before: trainers that import it from here are told that flows.stop.callback has it."""

import warnings

from flows.stop.callback import StopOnFile

__all__ = ["StopOnFile"]

warnings.warn(
    "flows.stop_callback is flows.stop.callback now: import StopOnFile from there.", DeprecationWarning, stacklevel=2
)
