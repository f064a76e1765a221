"""Who may use the local stack: `HOME/auth`, one line `user:password`; where it is there, both servers ask for it.

What it says is in that file and in the environment of the stack's processes, which only their user can read: in no
command line, record, log or page.
"""

import secrets
from dataclasses import dataclass, field
from pathlib import Path

from deploy.errors import StackError

# MLflow refuses a shorter one when it makes the user.
_SHORTEST = 12


@dataclass(frozen=True)
class Access:
    """The user that both servers know."""

    user: str
    password: str = field(repr=False)


def read_access(home: Path) -> Access | None:
    """Read `HOME/auth`, or return None where there is none; StackError where it is not fit to keep a secret."""
    path = home / "auth"
    try:
        mode, content = path.stat().st_mode, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    if mode & 0o077:
        raise StackError(f"{path} can be read by others (mode {mode & 0o777:o}). Run `chmod 600 {path}`.")
    user, colon, password = content.strip().partition(":")
    if not user or not colon or len(password) < _SHORTEST or len(content.strip().splitlines()) != 1:
        raise StackError(f"{path} must hold one line, user:password, with {_SHORTEST} characters of password or more.")
    return Access(user, password)


def client_environment(access: Access | None) -> dict[str, str]:
    """Return the variables with which a process of ours is let in."""
    if access is None:
        return {}
    return {
        "PREFECT_API_AUTH_STRING": f"{access.user}:{access.password}",
        "MLFLOW_TRACKING_USERNAME": access.user,
        "MLFLOW_TRACKING_PASSWORD": access.password,
    }


def prefect_environment(access: Access | None) -> dict[str, str]:
    """Return the variables that make the Prefect server ask."""
    return {} if access is None else {"PREFECT_SERVER_API_AUTH_STRING": f"{access.user}:{access.password}"}


def mlflow_environment(access: Access | None, *, users: Path) -> dict[str, str]:
    """Return the variables that MLflow's basic-auth app asks by, after writing its configuration beside `users`.

    `users` is its database, in which the user is made as administrator at the first start.
    """
    if access is None:
        return {}
    configuration = users.with_suffix(".ini")
    configuration.parent.mkdir(parents=True, exist_ok=True)
    # The hash that a password is compared with is slow by design, and every request would pay for it.
    lines = [
        "[mlflow]",
        "default_permission = READ",
        f"database_uri = sqlite:///{users}",
        "auth_cache_ttl_seconds = 60",
    ]
    configuration.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(configuration),
        "MLFLOW_AUTH_ADMIN_USERNAME": access.user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": access.password,
        # Signs the page that makes users; one worker serves it, so it need not outlive the process.
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }
