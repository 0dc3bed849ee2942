"""Which checkpoints stay: a pure function of the steps, their metrics and the policy.

Order is by step, never by time. Ties for "best" go to the earlier step; a metric that is missing or not
finite is never best; the newest always stays.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """The last `keep_last` scheduled saves, the `keep_best` best, the multiples of `keep_every`."""

    keep_last: int
    keep_best: int
    keep_every: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a negative count or an interval below 1."""
        if self.keep_last < 0 or self.keep_best < 0:
            raise ValueError("keep_last and keep_best count checkpoints: 0 or more")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError("keep_every is an interval in updates: 1 or more")


@dataclass(frozen=True, slots=True)
class SavedStep:
    """One checkpoint: whether a schedule asked for it, and its metric where it was evaluated at its step."""

    step: int
    scheduled: bool
    metric: float | None = None


def select_retained(
    saved: Sequence[SavedStep],
    policy: RetentionPolicy,
    *,
    direction: Literal["minimize", "maximize"] = "minimize",
    pinned: frozenset[int] = frozenset(),
    source: int | None = None,
) -> dict[int, list[str]]:
    """The steps of `saved` that stay, in order, each with its reasons; the order of `saved` does not matter.

    `pinned` are steps that a person wants to keep, `source` is the step that the run went on from; either may
    name a step that is not there. Raises ValueError where a step appears twice or the direction is unknown.
    """
    by_step = {one.step: one for one in saved}
    if len(by_step) != len(saved):
        raise ValueError("a step appears twice among the saved checkpoints")
    if direction not in ("minimize", "maximize"):
        raise ValueError(f"the direction is minimize or maximize, not {direction!r}")
    steps = sorted(by_step)
    scheduled = [step for step in steps if by_step[step].scheduled]
    reasons: list[tuple[str, set[int]]] = [
        ("newest", set(steps[-1:])),
        ("last", set(scheduled[max(0, len(scheduled) - policy.keep_last) :])),
        ("best", set(_ranked(saved, direction)[: policy.keep_best])),
    ]
    if policy.keep_every is not None:
        divided = {step for step in steps if step % policy.keep_every == 0}
        reasons.append((f"every {policy.keep_every}", divided))
    reasons.append(("pinned", set(pinned)))
    reasons.append(("resumed from", {source} if source is not None else set()))
    told = {step: [reason for reason, stays in reasons if step in stays] for step in steps}
    return {step: why for step, why in told.items() if why}


def select_mirrored(reasons: Mapping[int, Sequence[str]], ended: Collection[int]) -> list[int]:
    """The steps of `kept`'s answer that a second disk is to hold: best, every M, and where the run ended or stopped.

    `ended` are the steps that were saved because the loop ended there. Where none of all this is there, the newest.
    """
    found = [
        step
        for step, why in reasons.items()
        if step in ended or any(reason == "best" or reason.startswith("every ") for reason in why)
    ]
    return sorted(found) or sorted(reasons)[-1:]


def _ranked(saved: Sequence[SavedStep], direction: str) -> list[int]:
    sign = 1 if direction == "minimize" else -1
    measured = [(one.metric, one.step) for one in saved if one.metric is not None]
    return [step for _, step in sorted((sign * metric, step) for metric, step in measured if math.isfinite(metric))]
