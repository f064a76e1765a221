"""A model's own chat template, applied within bounds: it is a program, and comes with somebody else's model.

jinja's sandbox lets it call nothing, and does not keep it from counting to 10^12 or from multiplying a text by as much.
"""

import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jinja2

from evaluation.errors import ModelError

# Of processor time; a prompt takes a thousandth of a second.
SECONDS = 10.0
_MOST_CHARACTERS = 1 << 22
_MOST_MEMORY = 512 << 20
# A first signal may come where an exception is lost.
_AGAIN_SECONDS = 0.05


class _TooLongError(Exception):
    """The time is up."""


def rendered(render: Callable[[], str], *, model: str) -> str:
    """Return what `render` makes of a chat template of `model`.

    Raises ModelError when that takes more than SECONDS, more memory or more text than a prompt has, or fails.
    """
    try:
        with _bounded_time(), _bounded_memory():
            text = render()
    except _TooLongError:
        what = f"takes more than {SECONDS:g} seconds for one prompt"
    except (MemoryError, OverflowError) as error:
        what = f"makes too much of one prompt ({type(error).__name__})"
    except RecursionError:
        what = "is nested too deep"
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"fails: {' '.join(str(error)[:200].split()) or type(error).__name__}"
    else:
        if len(text) <= _MOST_CHARACTERS:
            return text
        what = f"makes {len(text)} characters of one prompt"
    raise ModelError(
        f"the chat template of {model} {what}: score the model without @chat, in the benchmark's own format."
    )


@contextmanager
def _bounded_time() -> Iterator[None]:
    # Elsewhere signals are not delivered; a worker renders where it began.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    running = True

    def stop(*_: object) -> None:
        if running:
            raise _TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, _AGAIN_SECONDS)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    # One operation may ask for all of it, and no signal comes in between.
    pages = Path("/proc/self/statm")
    if sys.platform != "linux" or not pages.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = int(pages.read_text().split()[0]) * resource.getpagesize() + _MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (room if soft == resource.RLIM_INFINITY else min(room, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
