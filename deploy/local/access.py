"""Who may use the local stack: `HOME/auth`, one line `user:password`, which `relex up` makes where there is none.

What it says is in that file and in the environment of the processes that use the stack, which only their user can read:
in no command line, record, log or page. The home and what the stack writes there are their user's alone.
"""

import base64
import contextlib
import json
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from deploy.errors import StackError
from deploy.files import unfinished_path

# In the place of user:password, a server without one; nobody writes that without having read it.
OPEN = "anyone on this machine may run commands as me"
USER = "relex"
# The path of both servers by which a browser is let in.
ENTRANCE = "/enter"
_SHORTEST = 12
# What the user's own processes put there has their modes: predictions are hard links of files that lie elsewhere.
_OF_THE_USER = ("mlflow/artifacts", "models")


@dataclass(frozen=True)
class Access:
    """The user that both servers know."""

    user: str
    password: str = field(repr=False)

    @property
    def authorization(self) -> str:
        """The header by which a request is let in."""
        return f"Basic {base64.b64encode(f'{self.user}:{self.password}'.encode()).decode()}"

    def enter(self, url: str) -> str:
        """Return the address of a server with which a browser is let in."""
        scheme, separator, place = url.partition("://")
        return f"{scheme}{separator}{quote(self.user, safe='')}:{quote(self.password, safe='')}@{place}{ENTRANCE}"


def access_file(home: Path) -> Path:
    """Return where a home says who may use its stack."""
    return home / "auth"


def read_access(home: Path) -> Access | None:
    """Read `HOME/auth`; None where there is none or it says OPEN. StackError where it is not fit to keep a secret."""
    path = access_file(home)
    try:
        mode, content = path.stat().st_mode, path.read_bytes()
    except FileNotFoundError:
        return None
    if mode & 0o077:
        raise StackError(f"{path} can be read by others (mode {mode & 0o777:o}). Run `chmod 600 {path}`.")
    line = content.decode("ascii", errors="replace").strip()
    if line == OPEN:
        return None
    user, colon, password = line.partition(":")
    # A browser and a library of Python's encode other characters differently.
    if not user or not colon or len(password) < _SHORTEST or not (line.isascii() and line.isprintable()):
        raise StackError(
            f"{path} must hold one line, user:password, of ASCII characters, with {_SHORTEST} of password or more."
            " `relex up` makes it where it is not there."
        )
    return Access(user, password)


def is_open(home: Path) -> bool:
    """Return whether the home's user wrote OPEN in `HOME/auth`."""
    return access_file(home).is_file() and read_access(home) is None


def make_access(home: Path) -> None:
    """Write a new password to `HOME/auth` where there is no such file; the caller holds the stack's lock."""
    path = access_file(home)
    if path.exists():
        return
    unfinished = unfinished_path(path)
    unfinished.unlink(missing_ok=True)
    # With its mode from the start, and with its name only when it is complete.
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{USER}:{secrets.token_urlsafe(24)}\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def close_home(home: Path) -> None:
    """Make the home, a directory of mode 700; StackError where it is somebody else's."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if home.stat().st_uid != os.geteuid():
        raise StackError(f"{home} belongs to another user. Give --home a directory of your own.")
    _close(home)


def close_files(home: Path) -> None:
    """Take from others what the stack has written: what an earlier version left, and libraries of ours make."""
    for name, directories, files in os.walk(home):
        place = Path(name)
        for path in (place / each for each in (*directories, *files)):
            # A database's journal comes and goes.
            with contextlib.suppress(FileNotFoundError):
                _close(path)
        directories[:] = [each for each in directories if str((place / each).relative_to(home)) not in _OF_THE_USER]


def client_environment(access: Access | None) -> dict[str, str]:
    """Return the variables with which a process of ours is let in."""
    if access is None:
        return {}
    return {
        # Not PREFECT_API_AUTH_STRING, which its subscriptions to events and logs do not send in a header.
        "PREFECT_CLIENT_CUSTOM_HEADERS": json.dumps({"Authorization": access.authorization}),
        "MLFLOW_TRACKING_USERNAME": access.user,
        "MLFLOW_TRACKING_PASSWORD": access.password,
    }


def _close(path: Path) -> None:
    status = path.lstat()
    if status.st_mode & 0o077 and status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode):
        path.chmod(status.st_mode & 0o700)
