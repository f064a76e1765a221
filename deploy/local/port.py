"""A port of the loopback interface: whether it is free, which one is, and who listens on it."""

import socket
from collections.abc import Sequence

import psutil

HOST = "127.0.0.1"


def is_free(port: int) -> bool:
    """Return whether a server can listen on the port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def listens(group: Sequence[psutil.Process], *, port: int) -> bool:
    """Return whether one of the processes listens on a port: what answers there may be a stranger."""
    for process in group:
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:
            continue
        if any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in connections):
            return True
    return False
