"""What can go wrong, as one tree.

RelexError
├── StoreError                     the store as a whole: no checkpoints, too few steps
│   ├── AbsentError                    there is no such training run
│   └── UnreachableError               a store does not answer, or does not let us in
├── CheckpointError                one checkpoint, or the base
│   ├── CheckpointIncompleteError      files missing, truncated or still being written
│   ├── CheckpointMismatchError        names, shapes or dtypes differ from the base
│   ├── CheckpointChangedError         a file changed while it was read
│   ├── CheckpointDamagedError         a stretch of zeros where weights were
│   ├── NonFiniteError                 NaN or infinity in a tensor, read or predicted
│   └── DuplicateError                 the same weights as the checkpoint before
├── TargetError                    the target step, the window or the method's parameters make no sense here
├── MemoryBudgetError              --memory is below what one pass needs
└── OutputError                    the output exists, or what was written there is not what its manifest says

Every message is one line: the fact with names and both values, then the way out.
"""


class RelexError(Exception):
    """Root of everything relex refuses."""


class StoreError(RelexError):
    """The store as a whole cannot be used."""


class AbsentError(StoreError):
    """There is no such training run, or not any more."""


class UnreachableError(StoreError):
    """A store, or a file system, does not answer, or does not let us in."""


class CheckpointError(RelexError):
    """One checkpoint, or the base, cannot be used."""


class CheckpointIncompleteError(CheckpointError):
    """Files are missing, truncated or still being written."""


class CheckpointMismatchError(CheckpointError):
    """Names, shapes or dtypes differ from the base's."""


class CheckpointChangedError(CheckpointError):
    """A file changed while it was read."""


class ContentChangedError(CheckpointChangedError):
    """A file holds other bytes than when the trajectory was first read, and its size and times do not say so."""


class CheckpointDamagedError(CheckpointError):
    """A stretch of a tensor reads as zeros where the base has weights."""


class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity."""


class DuplicateError(CheckpointError):
    """A checkpoint holds the same weights as the one before it."""


class TargetError(RelexError):
    """The target step, the window or the method's parameters make no sense for this trajectory."""


class MemoryBudgetError(RelexError):
    """The memory budget is below what one pass needs."""


class OutputError(RelexError):
    """The output exists already, or is not what its manifest says."""
