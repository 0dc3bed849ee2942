"""mlx-lm's optimizer, learning rate and schedule as ours.

mlx computes the rate of update u (1, 2, …) as f(u - 1), so a decay over `steps` ends at update steps + 1. Its warm-up
of W rises from 0 at update 1 to the peak at update W + 1, and the decay begins with the peak again at update W + 2.
Ours rises from peak / (w + 1) and has the peak once, at update w + 1: with w = W + 1 both give the same rate from
update W + 2 on, and the same sum of rates before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runner.config import schema
from runner.migrate.carry import Carried
from runner.migrate.values import Cannot, number, truth, whole

_SHAPES = {"cosine_decay": "cosine", "linear_schedule": "linear"}
_OPTIONS: dict[str, Any] = {
    "betas": lambda v: [number(item) for item in v] if isinstance(v, (list, tuple)) else _no_list(),
    "eps": number,
    "bias_correction": truth,
    "weight_decay": number,
    "momentum": number,
    "nesterov": truth,
}


def optimizer(to: Carried) -> None:
    """The optimizer and its options."""
    sections = to.old.said.get("optimizer_config")
    to.seen.add("optimizer_config")
    if sections is not None and not isinstance(sections, dict):
        to.leave("optimizer_config", "it is not a mapping from optimizers to their options")
        sections = None
    sections = sections or {}
    used = ""
    if to.has("optimizer"):
        used = str(to.value("optimizer")).lower()
        if used in schema.metadata()["optimizer.name"].choices:
            to.accept("optimizer", to.value("optimizer"), {}, {"optimizer": used})
            _options(to, used, sections.get(used))
        else:
            known = ", ".join(map(str, schema.metadata()["optimizer.name"].choices))
            reason = f"not there yet ({known}): the command below uses adamw, which needs a learning rate of its own"
            to.leave("optimizer", reason)
    for name, options in sections.items():
        if options and name != used:
            to.elsewhere(f"optimizer_config.{name}", f"not used: the optimizer is {used or 'ours'}", options)
        elif options and used not in schema.metadata()["optimizer.name"].choices:
            to.leave(f"optimizer_config.{name}", "its optimizer is not there yet", options)


def schedule(to: Carried) -> None:
    """The learning rate, constant or on a schedule."""
    to.seen.add("lr_schedule")
    given = to.old.said.get("lr_schedule")
    if not given:
        to.elsewhere("lr_schedule", "empty: a constant rate")
        to.put("learning_rate", number, "optimizer.learning_rate")
        return
    to.elsewhere("learning_rate", "lr_schedule wins over it there")
    try:
        groups, values, note = scheduled(given, to.values.get("train.iters", schema.TrainConfig().iters))
        to.accept("lr_schedule", given, values, groups, note)
    except Cannot as reason:
        to.leave("lr_schedule", f"{reason}", given)
        try:
            first = number(given["arguments"][0])
            note = "its first rate, constant"
            to.accept("lr_schedule.arguments", first, {"optimizer.learning_rate": first}, note=note)
        except (Cannot, LookupError, TypeError):
            to.left[-1].reason += "; the learning rate is our default: set optimizer.learning_rate"


def scheduled(given: Any, iters: int) -> tuple[dict[str, str], dict[str, Any], str]:
    """Our groups, settings and a remark for an lr_schedule, in a run of `iters` updates.

    Raises:
        Cannot: it has no equal here.
    """
    arguments = given.get("arguments") if isinstance(given, Mapping) else None
    if not isinstance(arguments, (list, tuple)) or not arguments:
        raise Cannot("it is not a mapping with a name and a list of arguments")
    name = str(given.get("name"))
    peak, warmup = number(arguments[0]), whole(given.get("warmup") or 0)
    if warmup < 0:
        raise Cannot("its warmup is negative")
    if warmup and number(given.get("warmup_init") or 0):
        raise Cannot("the warm-up here begins at zero, not at warmup_init: leave that out to carry it over")
    rise, said = (warmup + 1, _warmup(warmup)) if warmup else (0, "counted in updates, there too")
    if name in ("exponential_decay", "step_decay") and len(arguments) > 1 and number(arguments[1]) == 1:
        values = {"optimizer.learning_rate": peak}
        if warmup:
            values |= {"schedule.iters": max(iters, rise + 1), "schedule.warmup": rise}
        return {"schedule": "constant"}, values, said
    if name == "exponential_decay" and len(arguments) == 2:
        return _exponential(peak, number(arguments[1]), rise, iters, said)
    if name not in _SHAPES:
        there = ", ".join(map(str, schema.metadata()["schedule.name"].choices))
        raise Cannot(f"{name} is not there yet ({there}): schedule=cosine falls smoothly to schedule.end")
    order = (1, 2) if name == "cosine_decay" else (2, 1)
    if len(arguments) != 3 and not (name == "cosine_decay" and len(arguments) == 2):
        raise Cannot(f"{name} has other arguments in mlx")
    steps = whole(arguments[order[0]])
    end = number(arguments[order[1]]) if len(arguments) == 3 else 0.0
    if steps < 1:
        raise Cannot("it has to have 1 step or more")
    if name == "linear_schedule" and peak == 0 and not warmup:
        # A rise from zero: that is what a warm-up is.
        values = {"optimizer.learning_rate": end, "schedule.iters": max(iters, steps + 1), "schedule.warmup": steps}
        return {"schedule": "constant"}, values, "a rise from zero is a warm-up here, its first update not at zero"
    last = steps + rise + 1
    if last > iters:
        said += f"; the run ends at update {iters}, before the schedule does at {last}"
    values = {"optimizer.learning_rate": peak, "schedule.iters": last, "schedule.warmup": rise, "schedule.end": end}
    return {"schedule": _SHAPES[name]}, values, said


def _exponential(
    peak: float, factor: float, rise: int, iters: int, said: str
) -> tuple[dict[str, str], dict[str, Any], str]:
    """A factor per update there; here the rate of the run's last update, to which the same factor leads."""
    last = max(iters, rise + 2)
    try:
        end = peak * factor ** (last - rise - 1)
    except OverflowError:
        end = math.inf
    if factor <= 0 or not 0 < end < math.inf:
        raise Cannot(f"exponential_decay by {factor} does not reach a positive rate at update {last}")
    values = {"optimizer.learning_rate": peak, "schedule.iters": last, "schedule.warmup": rise, "schedule.end": end}
    return {"schedule": "exponential"}, values, f"{said}; the rate stays at schedule.end after update {last}"


def _options(to: Carried, used: str, given: Any) -> None:
    if given is not None and not isinstance(given, dict):
        to.leave(f"optimizer_config.{used}", "it is not a mapping of options", given)
        given = None
    given = {str(k): v for k, v in (given or {}).items()}
    takes = schema.choice_options("optimizer", used)
    for option in [o for o in _OPTIONS if o in given] + sorted(set(given) - set(_OPTIONS)):  # momentum before nesterov
        key, value = f"optimizer_config.{used}.{option}", given[option]
        try:
            if option == "dampening" and not number(value):
                continue
            if option not in takes:
                raise Cannot(f"optimizer={used} has no such option here ({', '.join(takes)})")
            to.accept(key, value, {f"optimizer.{option}": _OPTIONS[option](value)})
        except Cannot as reason:
            to.leave(key, f"{reason}", value)
    if "bias_correction" in takes and "bias_correction" not in given and not to.our_defaults:
        key = "optimizer_config.bias_correction"
        note = "off there unless said: the first updates are about three times as large"
        to.accept(key, False, {"optimizer.bias_correction": False}, note=note, said=False)


def _warmup(warmup: int) -> str:
    return (
        f"{warmup + 1} updates here for a warmup of {warmup}: there the first has rate zero and the peak comes twice; "
        f"equal from update {warmup + 2} on"
    )


def _no_list() -> list[float]:
    raise Cannot("it is not a list")
