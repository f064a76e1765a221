"""The processes that serve flows beside the servers of the local stack: how each is started, and started again."""

import sys
from pathlib import Path

from deploy.local.daemon import Daemon, find
from deploy.local.stack import Stack, environment, halt, spawn, status
from flows.errors import WatchError

PROMOTER = "promoter"
_WATCHER = "watcher-"
# Where the command of a watcher names its relex.yaml.
_CONFIG = 3


def spawn_watcher(running: Stack, training_run: str, config: Path) -> Daemon:
    """Start the process that serves one training run's watcher and extrapolation; a live one is left alone.

    One whose config was moved away is stopped first; WatchError where another config of that training run is watched.
    """
    live = find(running.home, f"{_WATCHER}{training_run}")
    if live is not None and live.state == "running" and _config(live) != config.absolute():
        if _config(live).exists():
            raise WatchError(
                f"training run {training_run} is watched by {_config(live)} already, and {config} names the same one."
                f" Give it another training_run, or stop the other with `relex down {training_run}`."
            )
        halt(running.home, live.name)
    argv = [sys.executable, "-m", "flows.deployments", str(config.absolute()), "--tracking-uri", running.mlflow_url]
    return spawn(running.home, f"{_WATCHER}{training_run}", argv, environment=environment(running))


def watcher(home: Path, training_run: str) -> Daemon:
    """Return the process of one training run, running or not; WatchError where there never was one."""
    watcher = find(home, f"{_WATCHER}{training_run}")
    if watcher is None:
        known = [process.name.removeprefix(_WATCHER) for process in status(home) if watched(process) is not None]
        there = f"There are {', '.join(known)}" if known else "Nothing is watched"
        raise WatchError(f"no training run {training_run} is watched in {home}. {there}.")
    return watcher


def stop_watcher(home: Path, training_run: str) -> Daemon:
    """Stop the process of one training run, and return it stopped; WatchError where there never was one."""
    halt(home, watcher(home, training_run).name)
    return watcher(home, training_run)


def revive_watchers(running: Stack) -> list[Daemon]:
    """Start the watchers again that died or that were stopped with the stack, and return them.

    Those that were stopped by themselves stay stopped.
    """
    return [
        spawn_watcher(running, process.name.removeprefix(_WATCHER), config)
        for process in status(running.home)
        if (process.state == "dead" or process.resumes) and (config := watched(process)) is not None
    ]


def watched(process: Daemon) -> Path | None:
    """Return the config that a process watches, or re-grounds; None where it does something else."""
    return _config(process) if process.name.startswith(_WATCHER) else None


def _config(watcher: Daemon) -> Path:
    return Path(watcher.argv[_CONFIG])


def spawn_promoter(running: Stack) -> None:
    """Start the process that takes approvals up and judges what was set in MLflow; a live one is left alone."""
    argv = [sys.executable, "-m", "flows.promote.promoter", "--tracking-uri", running.mlflow_url]
    argv += ["--downloads", str(running.home / "models")]
    spawn(running.home, PROMOTER, argv, environment=environment(running))
