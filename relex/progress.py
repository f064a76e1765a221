"""How long work says how far it is: a function that is called with what is being done, how much of it, and of how much.

Whoever knows its subject takes a Progress, which is a Tell with the subject said already (see `telling`).
"""

from collections.abc import Callable

Tell = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, how much there is)."""

Progress = Callable[[int, int], None]
"""Called with (how much is done, how much there is)."""


def telling(tell: Tell | None, what: str) -> Progress | None:
    """Return what tells how much of one thing is done, None when nobody listens."""
    return None if tell is None else lambda done, total: tell(what, done, total)
