"""Threads that work side by side, in which BLAS calls stay in the thread that makes them.

A product is seldom large enough to be worth handing out to other threads and waiting for them, and what lies between
products is not divided by a BLAS at all. So the threads divide the positions of a batch, and each goes its own way.
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
_pool: ThreadPoolExecutor | None = None
_count = 1
_PREFIXES = ("openblas", "scipy_openblas", "bli_thread")
"""Of the functions by which a BLAS tells how many threads it uses, and is told."""


def configure(count: int) -> None:
    """How many threads there are: as many as the BLAS has."""
    global _pool, _count
    if count != _count:
        if _pool is not None:
            _pool.shutdown()
        _pool, _count = (ThreadPoolExecutor(count - 1, thread_name_prefix="lane") if count > 1 else None), count


def count_for(size: int, least: int) -> int:
    """How many threads share `size` pieces of work where each is to have `least` or more."""
    return max(1, min(_count, size // least))


def side_by_side(work: Callable[[int, Barrier], T], count: int) -> list[T]:
    """The results of work(0, barrier) to work(count - 1, barrier), each in a thread of its own, this one the first.

    At the barrier they wait for each other. `count` is at most what `configure` was told. The first error is raised
    when all have ended.
    """
    barrier = Barrier(count)

    def one(number: int) -> T:
        try:
            return work(number, barrier)
        except BaseException:
            barrier.abort()
            raise

    if count == 1 or _pool is None:
        return [one(0)]
    errors: list[BaseException] = []
    results: list[T] = []
    with _single_threaded_blas():
        others = [_pool.submit(one, number) for number in range(1, count)]
        for get in (lambda: one(0), *(other.result for other in others)):
            try:
                results.append(get())
            except BaseException as error:
                errors.append(error)
    if errors:
        raise next((error for error in errors if not isinstance(error, BrokenBarrierError)), errors[0])
    return results


@contextmanager
def _single_threaded_blas() -> Iterator[None]:
    """MLX shares the BLAS, and gets its threads back afterwards."""
    found = _thread_count()
    if found is None:
        yield
        return
    get, put = found
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)


@cache
def _thread_count() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """How many threads the BLAS uses: to be read and to be set."""
    try:
        everything = ctypes.CDLL(None)
    except OSError:
        return None
    for prefix in _PREFIXES:
        get, put = (getattr(everything, f"{prefix}_{verb}_num_threads", None) for verb in ("get", "set"))
        if get is not None and put is not None:
            get.argtypes, get.restype = [], ctypes.c_int
            put.argtypes, put.restype = [ctypes.c_int], None
            return get, put
    return None
