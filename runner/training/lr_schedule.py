"""Learning rate as a pure function of the update, counted from 1; the last update has exactly the rate `end`."""

from __future__ import annotations

import math
from collections.abc import Callable

Shape = Callable[[float, float, float], float]
"""Learning rate by the progress of the schedule (0 to 1), the peak at 0 and the end at 1."""


def constant(progress: float, peak: float, end: float) -> float:
    """Stay at the peak; `end` is not used."""
    return peak


def linear(progress: float, peak: float, end: float) -> float:
    """Change by the same amount with every update."""
    return end + (peak - end) * (1.0 - progress)


def cosine(progress: float, peak: float, end: float) -> float:
    """Follow half a cosine, as in SGDR (arXiv:1608.03983) without restarts."""
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def exponential(progress: float, peak: float, end: float) -> float:
    """Change by the same factor with every update; `end` must be above 0."""
    return peak * (end / peak) ** progress


SHAPES: dict[str, Shape] = {"constant": constant, "linear": linear, "cosine": cosine, "exponential": exponential}


def learning_rate(update: int, *, name: str, peak: float, iters: int, warmup: int = 0, end: float = 0.0) -> float:
    """Return the learning rate of `update` (1, 2, …).

    It rises linearly over `warmup` updates, none of which has rate zero, and has the peak at update `warmup` + 1.
    Except for `constant`, it has exactly the value `end` at update `iters` and stays there.
    """
    if update <= warmup:
        return peak * update / (warmup + 1)
    span = iters - warmup - 1
    if update >= iters and span > 0 and name != "constant":
        return end
    progress = (update - warmup - 1) / span if span > 0 else 0.0
    return SHAPES[name](progress, peak, end)
