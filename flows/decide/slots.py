"""How many evaluations run at once on this machine: a concurrency limit of Prefect's for each GPU it has.

The server gives out the slots and shows them; a killed holder's is free again when its lease has run out. A CPU is
limited where `evaluations` says so.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

from flows.settings import Settings

# The least that the server takes; the holder renews it all the while.
_LEASE_SECONDS = 60.0


def limits(settings: Settings) -> list[str]:
    """Return the names of the limits that an evaluation of this training run occupies on this machine."""
    host = socket.gethostname()
    if settings.device == "cpu":
        return [] if settings.evaluations is None else [f"cpu-{host}"]
    return sorted({f"gpu-{host}-{device.partition(':')[2] or 0}" for device in settings.device.split(",")})


def create_limits(settings: Settings) -> None:
    """Make sure that the server has the limits of this machine, and that they are what the settings say."""
    with get_client(sync_client=True) as client:
        for name in limits(settings):
            # Two training runs may start at once.
            with suppress(ObjectAlreadyExists):
                client.upsert_global_concurrency_limit_by_name(name, settings.evaluations or 1)


@contextmanager
def evaluating(settings: Settings) -> Iterator[None]:
    """Occupy this machine for an evaluation in the block, once there is room; where nothing is limited, at once."""
    names = limits(settings)
    if not names:
        yield
        return
    # A worker of a work pool has nobody who made them before.
    create_limits(settings)
    # A server that was away takes the slot back and not the hour that the evaluation has run.
    with concurrency(names, occupy=1, strict=True, lease_duration=_LEASE_SECONDS, raise_on_lease_renewal_failure=False):
        yield
