"""When to save: every so many updates, every so many minutes, or both; pure, with the time passed in."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_SCHEDULED, _BEST = "every ", "best"


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """`every` counts optimizer updates, `every_minutes` time since the last save; None: not so."""

    every: int | None
    every_minutes: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an interval that is not positive."""
        if self.every is not None and self.every < 1:
            raise ValueError("checkpoint.every is an interval in updates: 1 or more")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError("checkpoint.every_minutes is an interval in minutes: more than 0")

    def due(
        self, step: int, *, minutes_since_save: float, best: bool = False, stopping: str | None = None
    ) -> tuple[str, ...]:
        """Why to save after update `step`, as `Store.commit` records it; empty: do not.

        `best`: the evaluation at this step is the best so far. `stopping`: why the loop ends here
        ("finished", "stop_at", "SIGTERM"): the last state is saved. Step 0 is a baseline, never saved.
        """
        if step < 1:
            return ()
        why = []
        if self.every is not None and step % self.every == 0:
            why.append(f"{_SCHEDULED}{self.every}")
        if self.every_minutes is not None and minutes_since_save >= self.every_minutes:
            why.append(f"{_SCHEDULED}{self.every_minutes:g} minutes")
        if best:
            why.append(_BEST)
        if stopping:
            why.append(stopping)
        return tuple(why)


def is_scheduled(why: Sequence[str]) -> bool:
    """Whether a save for the reasons `why` counts for `keep_last`."""
    return any(reason.startswith(_SCHEDULED) for reason in why)


def is_end(why: Sequence[str]) -> bool:
    """Whether a save for the reasons `why` was made because the loop ended there."""
    return any(reason != _BEST and not reason.startswith(_SCHEDULED) for reason in why)


class SaveTimer:
    """Minutes since the last save, by a clock that a changed date does not move."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        """`monotonic` gives seconds; time counts from now."""
        self._monotonic = monotonic
        self._start = monotonic()

    def restart(self) -> None:
        """Call after each save."""
        self._start = self._monotonic()

    def minutes(self) -> float:
        """Minutes since the last `restart`; a clock that went back is counted from where it went."""
        now = self._monotonic()
        self._start = min(self._start, now)
        return (now - self._start) / 60
