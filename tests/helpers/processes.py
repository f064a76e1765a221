"""Processes that may end by themselves while they are looked at."""

import contextlib

import psutil


def children_of(process: psutil.Process) -> list[psutil.Process]:
    """Return what lives below a process; nothing when that is gone."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def command_of(process: psutil.Process) -> list[str]:
    """Return the command line of a process; nothing when it has ended, waited for or not, or is another user's."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Return the environment variables of a process; nothing when it is gone or another user's."""
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return {}


def kill_with_children(process: psutil.Process) -> None:
    """Kill a process and what lives below it."""
    for each in (process, *children_of(process)):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
