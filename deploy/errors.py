"""What deployment refuses.

DeployError
├── CandidateError           a model directory is not what its manifest says, or holds what must not be served
├── RegistryError            the MLflow store cannot be reached, or refused
│   ├── DigestConflictError  the digest is registered already, for other bytes
│   └── NoSuchVersionError   there is no such version to promote, or to go back to
├── ServingError             the champion cannot be served: its address is taken, or its engine does not come up
└── StackError               a server of the local stack does not start, or is not running
"""


class DeployError(Exception):
    """Anything deployment refuses; the message is one line: the fact, both values, the way out."""


class CandidateError(DeployError):
    """A model directory is not what its manifest says, or holds what must not be served."""


class RegistryError(DeployError):
    """The MLflow store cannot be reached, or refused what was asked of it."""


class DigestConflictError(RegistryError):
    """The digest is registered already, for other bytes."""


class NoSuchVersionError(RegistryError):
    """There is no such version to promote, or to go back to."""


class ServingError(DeployError):
    """The champion cannot be served: its address is taken, or its engine does not come up."""


class StackError(DeployError):
    """A server of the local stack does not start, or is not running."""
