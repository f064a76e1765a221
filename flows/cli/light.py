"""A light installation: `pip install relex-rlvr` brings the libraries that look at runs and predict, and no others."""

from importlib.util import find_spec

from flows.errors import InstallationError

# The commands that need no more.
COMMANDS = frozenset({"inspect", "backtest", "analyze", "methods", "extrapolate", "gate"})
WAY_OUT = "pip install 'relex-rlvr[all]' brings every command."


def lacking() -> list[str]:
    """Return which of the three large libraries are not installed: those that score, serve flows and register."""
    return [library for library in ("lm_eval", "prefect", "mlflow") if find_spec(library) is None]


def check(command: str) -> None:
    """Refuse a command, an InstallationError, where it needs more than is installed."""
    if command not in COMMANDS and (libraries := lacking()):
        raise InstallationError(f"relex {command} needs more than is installed ({', '.join(libraries)}). {WAY_OUT}")
