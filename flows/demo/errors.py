"""The demo's exceptions.

FlowError
└── DemoError
    ├── BaseModelError      the base model cannot be read
    ├── OutputExistsError   the place to write to is taken
    └── DemoRunError        a process of the demo failed
"""

from flows.errors import FlowError


class DemoError(FlowError):
    """What the demo's commands refuse, in one line."""


class BaseModelError(DemoError):
    """The directory given as base holds no model that loads."""


class OutputExistsError(DemoError):
    """The output directory already holds something, which is never overwritten or mixed with a new run."""


class DemoRunError(DemoError):
    """A process of the demo failed, or the decision does not come."""
