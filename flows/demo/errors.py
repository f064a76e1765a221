"""The demo's exceptions.

DemoError
├── BaseModelError      the base model cannot be read
└── OutputExistsError   the place to write to is taken
"""


class DemoError(Exception):
    """What the demo's commands refuse, in one line."""


class BaseModelError(DemoError):
    """The directory given as base holds no model that loads."""


class OutputExistsError(DemoError):
    """The output directory already holds something, which is never overwritten or mixed with a new run."""
