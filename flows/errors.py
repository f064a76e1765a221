"""What the flows and the command line refuse.

FlowError
├── ConfigError      relex.yaml is missing, is not YAML, or has a wrong key or value
├── WatchError       the training run is watched already
├── PinError         a checkpoint cannot be pinned
├── ShardError       the workers that write predictions cannot be reached
├── WindowError      the store is no longer what the window was announced with
├── StopError        the training cannot be stopped, or it is not known whether it was
├── PromotionError   a candidate does not become the champion
├── ObservedError    a real checkpoint cannot be registered
├── RegroundError    the cycles of a re-grounding are at work elsewhere, or were begun with other settings
│   └── AtWorkError     another process is at work on them
├── TrainerError     the user's trainer failed, or left no checkpoints to predict from
└── DemoError        see flows.demo.errors
"""

from collections.abc import Sequence


class FlowError(Exception):
    """Anything the flows refuse; the message is one line: the fact, both values, the way out."""


class ConfigError(FlowError):
    """relex.yaml is missing, is not YAML, or has a wrong key or value; `faults` are what is wrong, one by one."""

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.faults = tuple(faults) or (message,)


class WatchError(FlowError):
    """The training run is watched already."""


class PinError(FlowError):
    """A checkpoint cannot be pinned."""


class ShardError(FlowError):
    """The workers that write predictions cannot be reached."""


class WindowError(FlowError):
    """The store is no longer what the window was announced with."""


class StopError(FlowError):
    """The training cannot be stopped, or it is not known whether it was."""


class PromotionError(FlowError):
    """A candidate does not become the champion: it is damaged, or its stored gate results do not say that it should."""


class ObservedError(FlowError):
    """A real checkpoint is not registered: it is not there, or the gate does not say that it should be."""


class RegroundError(FlowError):
    """The cycles of a re-grounding are at work in another process, or were begun with other settings."""


class AtWorkError(RegroundError):
    """Another process is at work on the re-grounding."""


class TrainerError(FlowError):
    """The user's trainer failed, or left no checkpoints to predict from."""


class InstallationError(FlowError):
    """A library that a command needs is not installed."""


class ExportError(FlowError):
    """The champion cannot be exported: there is none, or there is no place for it."""
