"""The processes that serve flows beside the servers of the local stack: how each is started, and started again."""

import sys
from pathlib import Path

from deploy.local.daemon import Daemon
from deploy.local.stack import Stack, environment, spawn, status

PROMOTER = "promoter"
_WATCHER = "watcher-"
# Where the command of a watcher names its relex.yaml.
_CONFIG = 3


def spawn_watcher(running: Stack, training_run: str, config: Path) -> Daemon:
    """Start the process that serves one training run's watcher and extrapolation; a live one is left alone."""
    argv = [sys.executable, "-m", "flows.deployments", str(config.absolute()), "--tracking-uri", running.mlflow_url]
    return spawn(running.home, f"{_WATCHER}{training_run}", argv, environment=environment(running))


def revive_watchers(running: Stack) -> list[Daemon]:
    """Start the watchers again that died, and return them; those that were stopped stay stopped."""
    return [
        spawn_watcher(running, process.name.removeprefix(_WATCHER), config)
        for process in status(running.home)
        if process.state == "dead" and (config := watched(process)) is not None
    ]


def watched(process: Daemon) -> Path | None:
    """Return the config that a process watches, or re-grounds; None where it does something else."""
    return Path(process.argv[_CONFIG]) if process.name.startswith(_WATCHER) else None


def spawn_promoter(running: Stack) -> None:
    """Start the process that takes approvals of promotions up; a live one is left alone."""
    argv = [sys.executable, "-m", "flows.promote.promoter", "--tracking-uri", running.mlflow_url]
    argv += ["--downloads", str(running.home / "models")]
    spawn(running.home, PROMOTER, argv, environment=environment(running))


def revive_promoter(running: Stack) -> None:
    """Start it where it was ever started: an answer may be waiting for it."""
    if any(process.name == PROMOTER for process in status(running.home)):
        spawn_promoter(running)
