"""Bounds for what a stranger's chat template may take: it is a program, and may loop or build texts without end.

Jinja's sandbox keeps it from running code and from files, not from filling the memory.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SECONDS = 5.0
"""Of CPU time in Python; a template takes a fraction of a millisecond."""
BYTES = 500_000_000
"""Beyond what the process has."""


class LimitExceeded(Exception):
    """A limit was reached."""


@contextmanager
def limited() -> Iterator[None]:
    """Raise TooMuch where the block takes more than `SECONDS` or `BYTES`.

    Time is bounded in the main thread only, where Python handles signals, and memory on Linux only.
    """
    main = threading.current_thread() is threading.main_thread()
    before = _limit_memory()
    if main:
        former = signal.signal(signal.SIGVTALRM, _too_long)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    except MemoryError:
        raise LimitExceeded(f"more than {BYTES // 1_000_000} MB") from None
    finally:
        if main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, former)
        if before is not None:
            resource.setrlimit(resource.RLIMIT_AS, before)


def _limit_memory() -> tuple[int, int] | None:
    if sys.platform != "linux":
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb", buffering=0) as statm:
        pages = int(statm.read().split()[0])
    wanted = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(wanted, soft), hard))
    return soft, hard


def _too_long(number: int, frame: FrameType | None) -> None:
    raise LimitExceeded(f"more than {SECONDS:g} seconds")
