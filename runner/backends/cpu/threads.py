"""A team of threads that work side by side, in which BLAS calls stay in the thread that makes them.

A matrix product is seldom large enough to be worth distributing over threads, and a BLAS does not divide what lies
between products at all. So the threads divide the positions of a batch instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier, BrokenBarrierError
from typing import TypeVar

T = TypeVar("T")
_PREFIXES = ("openblas", "scipy_openblas", "bli_thread")
"""Prefixes of a BLAS library's functions that get and set its number of threads."""


class ThreadTeam:
    """Up to `count` threads, the calling one included."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count - 1, thread_name_prefix="partition") if count > 1 else None

    def run(self, work: Callable[[int, Barrier], T], count: int) -> list[T]:
        """Return the results of work(0, barrier) to work(count - 1, barrier), each computed in its own thread.

        `count` is at most the team's. If calls fail, the first error is raised once all have ended.
        """
        barrier = Barrier(count)

        def call(number: int) -> T:
            try:
                return work(number, barrier)
            except BaseException:
                barrier.abort()
                raise

        if count == 1 or self._pool is None:
            return [call(0)]
        errors: list[BaseException] = []
        results: list[T] = []
        with _single_threaded_blas():
            futures = [self._pool.submit(call, number) for number in range(1, count)]
            for get in (lambda: call(0), *(future.result for future in futures)):
                try:
                    results.append(get())
                except BaseException as error:
                    errors.append(error)
        if errors:
            raise next((error for error in errors if not isinstance(error, BrokenBarrierError)), errors[0])
        return results


@contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """Set the BLAS to one thread, and back afterwards: MLX uses the same library."""
    functions = _thread_count_functions()
    if functions is None:
        yield
        return
    get, set_ = functions
    before = get()
    set_(1)
    try:
        yield
    finally:
        set_(before)


@cache
def _thread_count_functions() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """Return the functions that get and set the BLAS's number of threads, or None where it has none."""
    try:
        process = ctypes.CDLL(None)
    except OSError:
        return None
    for prefix in _PREFIXES:
        get, set_ = (getattr(process, f"{prefix}_{verb}_num_threads", None) for verb in ("get", "set"))
        if get is not None and set_ is not None:
            get.argtypes, get.restype = [], ctypes.c_int
            set_.argtypes, set_.restype = [ctypes.c_int], None
            return get, set_
    return None
