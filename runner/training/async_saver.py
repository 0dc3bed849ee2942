"""Saving while training goes on: one save at a time, in a thread of its own.

A save that fails ends the run at its next step, not at its end: `check` raises on the training thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class AsyncSaver:
    """Runs saves in the background, or at once where `background` is off."""

    def __init__(self, background: bool = True) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save") if background else None
        self._pending: Future[None] | None = None

    def begin(self, save: Callable[[], None]) -> None:
        """Start `save`; waits for the one before it, so that a slow disk holds at most one snapshot in memory.

        Raises what the one before it raised.
        """
        self.wait()
        if self._pool is None:
            save()
        else:
            self._pending = self._pool.submit(save)

    def check(self) -> None:
        """Raise what a save raised that has ended; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return once nothing is being saved; raises what that save raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> Exception | None:
        """End the thread, after the save that it is at; returns what that save raised, if anything."""
        failed: Exception | None = None
        try:
            self.wait()
        except Exception as error:
            failed = error
        if self._pool is not None:
            self._pool.shutdown()
        return failed
