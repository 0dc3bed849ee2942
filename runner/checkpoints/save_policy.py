"""When a checkpoint is saved, and why: pure functions, with the elapsed time passed in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum


class StopReason(Enum):
    """Why training ended. The values are what status.json and the manifests of checkpoints hold."""

    FINISHED = "finished"
    EARLY_STOPPING = "early stopping"
    STOP_AT = "stop_at"
    SIGTERM = "SIGTERM"
    SIGINT = "SIGINT"
    SIGHUP = "SIGHUP"
    REPLACE = "process replaced"

    @property
    def is_completion(self) -> bool:
        """Whether the run is complete; after any other reason it can be resumed."""
        return self in (StopReason.FINISHED, StopReason.EARLY_STOPPING)


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """Intervals between saves: in optimizer updates, and in minutes since the last save; None: no such interval."""

    every: int | None
    every_minutes: float | None = None

    def reasons_to_save(
        self, step: int, *, minutes_since_save: float, best: bool = False, stop: StopReason | None = None
    ) -> tuple[str, ...]:
        """Return why to save after update `step`, as a manifest records it; empty if no save is due.

        Step 0 is never saved.

        Args:
            best: whether the evaluation at this step is the best so far.
            stop: why the loop ends here: its last state is saved.
        """
        if step < 1:
            return ()
        reasons = []
        if self.every is not None and step % self.every == 0:
            reasons.append(f"every {self.every} updates")
        if self.every_minutes is not None and minutes_since_save >= self.every_minutes:
            reasons.append(f"every {self.every_minutes:g} minutes")
        if best:
            reasons.append("best")
        if stop is not None:
            reasons.append(stop.value)
        return tuple(reasons)


def is_scheduled(save_reasons: Collection[str]) -> bool:
    """Return whether an interval asked for the save, so that it counts for checkpoint.keep_last."""
    return any(reason.startswith("every ") for reason in save_reasons)  # earlier versions wrote "every 100"


def is_end(save_reasons: Collection[str]) -> bool:
    """Return whether the checkpoint was saved because the loop ended there."""
    return any(stop.value in save_reasons for stop in StopReason)
