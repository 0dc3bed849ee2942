"""Learning rate as a pure function of the update, counted from 1; where a schedule ends, the last has exactly `end`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from runner.config import schema, validation
from runner.config.schema import Config

Shape = Callable[..., float]
"""Learning rate by `elapsed`, the updates since the one at the peak, and `span`, those from there to the last one, with
the options of the schedule as keywords, `peak` and `end` among them."""
DEFAULT_TIMESCALE = 10_000
"""schedule.timescale of inverse_sqrt without a warmup, as in transformers."""


def constant(elapsed: int, span: int, *, peak: float) -> float:
    """Stay at the peak."""
    return peak


def linear(elapsed: int, span: int, *, peak: float, end: float) -> float:
    """Change by the same amount with every update."""
    return end + (peak - end) * (1.0 - elapsed / span)


def cosine(elapsed: int, span: int, *, peak: float, end: float) -> float:
    """Follow half a cosine, as in SGDR (arXiv:1608.03983) without restarts."""
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * (elapsed / span)))


def exponential(elapsed: int, span: int, *, peak: float, end: float) -> float:
    """Change by the same factor with every update; `end` must be above 0."""
    return peak * (end / peak) ** (elapsed / span)


def cosine_with_restarts(elapsed: int, span: int, *, peak: float, end: float, cycles: int) -> float:
    """Follow half a cosine `cycles` times, each from the peak (SGDR, with cycles of equal length)."""
    return cosine(elapsed * cycles % span, span, peak=peak, end=end)


def wsd(elapsed: int, span: int, *, peak: float, end: float, decay: int, decay_shape: str) -> float:
    """Stay at the peak, and fall over the last `decay` updates (warmup, stable, decay: arXiv:2404.06395)."""
    decay = min(decay, span)
    fallen = max(0, elapsed - (span - decay))
    if decay_shape == "sqrt":
        return end + (peak - end) * (1.0 - math.sqrt(fallen / decay))
    return {"linear": linear, "cosine": cosine}[decay_shape](fallen, decay, peak=peak, end=end)


def step(elapsed: int, span: int, *, peak: float, step_size: int, gamma: float) -> float:
    """Multiply by `gamma` after every `step_size` updates."""
    return peak * gamma ** (elapsed // step_size)


def inverse_sqrt(elapsed: int, span: int, *, peak: float, timescale: int) -> float:
    """Fall with the square root of the updates, which are counted from `timescale` at the peak."""
    return peak * math.sqrt(timescale / (timescale + elapsed))


SHAPES: dict[str, Shape] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "cosine_with_restarts": cosine_with_restarts,
    "wsd": wsd,
    "step": step,
    "inverse_sqrt": inverse_sqrt,
}


def learning_rate_of(config: Config, update: int) -> float:
    """Return the learning rate of an update of a run with `config`, whose defaults are filled in."""
    schedule = config.schedule
    assert config.optimizer.learning_rate is not None
    return learning_rate(
        update,
        name=schedule.name,
        peak=config.optimizer.learning_rate,
        iters=schedule.iters or config.train.iters,
        warmup=schedule.warmup,
        **{option: getattr(schedule, option) for option in schema.choice_options("schedule", schedule.name)},
    )


def learning_rate(update: int, *, name: str, peak: float, iters: int, warmup: int = 0, **options: Any) -> float:
    """Return the learning rate of `update` (1, 2, …).

    It rises linearly over `warmup` updates, none of which has rate zero, and has the peak at update `warmup` + 1. With
    an option `end`, it has exactly this value at update `iters` and stays there.

    Args:
        iters: the last update of the schedule.
        options: those that the schema has for the schedule `name`.
    """
    if update <= warmup:
        return peak * update / (warmup + 1)
    span = iters - warmup - 1
    if "end" in options and span > 0 and update >= iters:
        return float(options["end"])
    if "decay" in options:
        options["decay"] = validation.decay_updates(options["decay"], iters)
    if "timescale" in options:
        options["timescale"] = options["timescale"] or warmup or DEFAULT_TIMESCALE
    # The peak alone where the schedule ends there.
    elapsed = update - warmup - 1 if span > 0 or "end" not in options else 0
    return SHAPES[name](elapsed, max(span, 1), peak=peak, **options)
