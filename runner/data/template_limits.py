"""Resource limits for rendering a chat template, which is a program from the model's author.

Jinja's sandbox keeps a template from running code and from files, but not from looping or building text without end.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

MAX_CPU_SECONDS = 5.0
"""CPU time of one rendering, in Python; a usual template takes a fraction of a millisecond."""
MAX_BYTES = 500_000_000
"""Memory of one rendering, beyond what the process uses already."""


class LimitExceeded(Exception):
    """The rendering took more than a limit allows; the message is the limit."""


@contextmanager
def template_limits() -> Iterator[None]:
    """Raise LimitExceeded where the block takes more than `MAX_CPU_SECONDS` or `MAX_BYTES`.

    Time is limited in the main thread only, where Python handles signals, and memory on Linux only.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    former_limit = _limit_memory()
    if in_main_thread:
        former_handler = signal.signal(signal.SIGVTALRM, _on_timeout)
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_SECONDS)
    try:
        yield
    except MemoryError:
        raise LimitExceeded(f"more than {MAX_BYTES // 1_000_000} MB") from None
    finally:
        if in_main_thread:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, former_handler)
        if former_limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, former_limit)


def _limit_memory() -> tuple[int, int] | None:
    """Lower the soft limit of the address space; return the former limits, None where this is not supported."""
    if sys.platform != "linux":
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb", buffering=0) as statm:
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    return soft, hard


def _on_timeout(signal_number: int, frame: FrameType | None) -> None:
    raise LimitExceeded(f"more than {MAX_CPU_SECONDS:g} seconds")
