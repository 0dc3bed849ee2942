"""Saving on a thread while training continues: one save at a time.

A failed save ends the run at its next update, not at its end: `check` raises on the training thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class AsyncSaver:
    """Runs saves on a thread, or in the caller if `background` is false."""

    def __init__(self, background: bool = True) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="save") if background else None
        self._pending: Future[None] | None = None

    def start(self, save: Callable[[], None]) -> None:
        """Start `save` after waiting for the previous save, so that memory holds at most one snapshot.

        Raises what the previous save raised, and without a background thread what `save` raises.
        """
        self.wait()
        if self._pool is None:
            save()
        else:
            self._pending = self._pool.submit(save)

    def check(self) -> None:
        """Raise what a completed save raised; do not wait for one in progress."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in progress and raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> Exception | None:
        """Wait for the save in progress, end the thread, and return what that save raised."""
        error: Exception | None = None
        try:
            self.wait()
        except Exception as raised:
            error = raised
        if self._pool is not None:
            self._pool.shutdown()
        return error
