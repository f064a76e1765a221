"""Our own code: a process that we start imports nothing from the directory in which it happens to be started.

A user's directory may have packages that are named like ours. Python itself starts processes of its own, and Prefect
does for each flow run: the variable reaches them all, an option of one command line would not.
"""

from collections.abc import Mapping

_VARIABLE = "PYTHONSAFEPATH"
# Python asks only whether it is empty: by the value it is known again as ours.
_OURS = "relex"


def own_code(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to `environment` for a process of ours: none where the user has set it."""
    return {} if environment.get(_VARIABLE) else {_VARIABLE: _OURS}


def for_the_user(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a program of the user's, which may import what lies where it is started."""
    return {name: value for name, value in environment.items() if (name, value) != (_VARIABLE, _OURS)}
