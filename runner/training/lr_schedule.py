"""Learning rate as a pure function of the update, counted from 1; the last update has exactly the end's value."""

from __future__ import annotations

import math
from collections.abc import Callable

Shape = Callable[[float], float]
"""Share of the way from the end's value (0) back to the peak (1), of the progress from 0 to 1."""

SHAPES: dict[str, Shape] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate(update: int, *, name: str, peak: float, iters: int, warmup: int = 0, end: float = 0.0) -> float:
    """The learning rate of `update` (1, 2, …).

    It rises linearly over `warmup` updates, none of which is wasted at zero, has the peak at update warmup + 1 and,
    except for `constant`, reaches `end` exactly at update `iters`, where it stays. Cosine as in SGDR
    (arXiv:1608.03983) without restarts.
    """
    if update <= warmup:
        return peak * update / (warmup + 1)
    if name == "constant":
        return peak
    span = iters - warmup - 1
    if update >= iters and span > 0:
        return end
    progress = (update - warmup - 1) / span if span > 0 else 0.0
    return end + (peak - end) * SHAPES[name](progress)
