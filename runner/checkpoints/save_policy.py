"""When a checkpoint is saved, and why: pure functions, with the elapsed time passed in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

# Earlier versions recorded the interval: "every 100", "every 5 minutes".
_EVERY_MINUTES = re.compile(r"every .* minutes")
_EVERY_UPDATES = re.compile(r"every .*")


class SaveReason(Enum):
    """Why a checkpoint was saved. The values are what manifest.json holds; those of the end are of StopReason."""

    UPDATES = "every N updates"
    MINUTES = "every N minutes"
    BEST = "best"
    FINISHED = "finished"
    EARLY_STOPPING = "early stopping"
    STOP_AT = "stop_at"
    SIGTERM = "SIGTERM"
    SIGINT = "SIGINT"
    SIGHUP = "SIGHUP"

    @property
    def is_scheduled(self) -> bool:
        """Whether an interval asked for the save, so that it counts for checkpoint.keep_last."""
        return self in (SaveReason.UPDATES, SaveReason.MINUTES)

    @property
    def is_end(self) -> bool:
        """Whether the checkpoint was saved because the loop ended there."""
        return not self.is_scheduled and self is not SaveReason.BEST


def parse_save_reasons(texts: Iterable[str]) -> frozenset[SaveReason]:
    """Return the reasons that a manifest holds as text, from any version; unknown ones are left out."""
    values = {reason.value for reason in SaveReason}
    reasons = set()
    for text in texts:
        if text in values:
            reasons.add(SaveReason(text))
        elif _EVERY_MINUTES.fullmatch(text):
            reasons.add(SaveReason.MINUTES)
        elif _EVERY_UPDATES.fullmatch(text):
            reasons.add(SaveReason.UPDATES)
    return frozenset(reasons)


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """Intervals between saves: in optimizer updates, and in minutes since the last save; None: no such interval."""

    every: int | None
    every_minutes: float | None = None

    def due(
        self, step: int, *, minutes_since_save: float, best: bool = False, stopping: SaveReason | None = None
    ) -> tuple[SaveReason, ...]:
        """Return why to save after update `step`; empty if no save is due. Step 0 is never saved.

        Args:
            best: whether the evaluation at this step is the best so far.
            stopping: why the loop ends here: its last state is saved.
        """
        if step < 1:
            return ()
        reasons = []
        if self.every is not None and step % self.every == 0:
            reasons.append(SaveReason.UPDATES)
        if self.every_minutes is not None and minutes_since_save >= self.every_minutes:
            reasons.append(SaveReason.MINUTES)
        if best:
            reasons.append(SaveReason.BEST)
        if stopping is not None:
            reasons.append(stopping)
        return tuple(reasons)
