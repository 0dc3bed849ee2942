"""The optimizer, learning rate and schedule of mlx-lm as ours.

mlx computes the rate of update u (1, 2, …) as f(u - 1), so a decay over `steps` ends at update steps + 1. Its warmup
of W updates rises from 0 at update 1 to the peak at update W + 1, and the decay starts with the peak again at update
W + 2. Ours rises from peak / (w + 1) and has the peak once, at update w + 1: with w = W + 1 both have the same rate
from update W + 2 on, and the same sum of rates before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runner.config import schema
from runner.migrate.convert import CannotImport, to_bool, to_float, to_floats, to_int
from runner.migrate.result import Convert, ImportResult

_SHAPES = {"cosine_decay": "cosine", "linear_schedule": "linear"}
_OPTIONS: dict[str, Convert] = {
    "betas": to_floats,
    "eps": to_float,
    "bias_correction": to_bool,
    "weight_decay": to_float,
    "momentum": to_float,
    "nesterov": to_bool,
    "ns_steps": to_int,
    "beta_1": to_float,
    "decay_rate": to_float,
    "clip_threshold": to_float,
    "scale_parameter": to_bool,
}
_RENAMED = {"beta_1": "beta1"}
_BIAS_CORRECTION = ("bias_correction", False, "off there unless said: the first updates are about three times as large")
_THEIR_DEFAULTS = {
    "adam": _BIAS_CORRECTION,
    "adamw": _BIAS_CORRECTION,
    "muon": ("weight_decay", 0.01, "0.01 there unless said"),
    "adafactor": ("scale_parameter", True, "on there unless said"),
}
"""By optimizer, the option whose default there differs from ours: its name, its default there, and a note."""
_RELATIVE_STEP_RATE, _RELATIVE_STEP_UPDATES = 0.01, 10_000
"""MLX's Adafactor with relative_step has the rate min(0.01, 1 / sqrt(update)), which falls from update 10,000 on."""


def optimizer(result: ImportResult) -> None:
    """Import the optimizer and its options."""
    sections = result.source.settings.get("optimizer_config")
    result.handled.add("optimizer_config")
    if sections is not None and not isinstance(sections, dict):
        result.skip("optimizer_config", "it is not a mapping from optimizers to their options")
        sections = None
    sections = sections or {}
    used = ""
    if result.applies("optimizer"):
        used = str(result.value("optimizer")).lower()
        if used in schema.metadata()["optimizer.name"].choices:
            result.add("optimizer", result.value("optimizer"), {}, {"optimizer": used})
            _options(result, used, sections.get(used))
        else:
            known = ", ".join(map(str, schema.metadata()["optimizer.name"].choices))
            reason = f"not there yet ({known}): the command below uses adamw, which needs a learning rate of its own"
            result.skip("optimizer", reason)
    for name, options in sections.items():
        if options and name != used:
            result.explain(f"optimizer_config.{name}", f"not used: the optimizer is {used or 'ours'}", options)
        elif options and used not in schema.metadata()["optimizer.name"].choices:
            result.skip(f"optimizer_config.{name}", "its optimizer is not there yet", options)


def schedule(result: ImportResult) -> None:
    """Import the learning rate, constant or on a schedule."""
    result.handled.add("lr_schedule")
    if _computes_its_rate(result):
        _relative_step(result)
        return
    given = result.source.settings.get("lr_schedule")
    if not given:
        result.explain("lr_schedule", "empty: a constant rate")
        result.import_key("learning_rate", to_float, "optimizer.learning_rate")
        return
    result.explain("learning_rate", "overridden by lr_schedule there")
    try:
        groups, values, note = scheduled(given, result.values.get("train.iters", schema.TrainConfig().iters))
        result.add("lr_schedule", given, values, groups, note)
    except CannotImport as reason:
        result.skip("lr_schedule", f"{reason}", given)
        try:
            first = to_float(given["arguments"][0])
            note = "its first rate, constant"
            result.add("lr_schedule.arguments", first, {"optimizer.learning_rate": first}, note=note)
        except (CannotImport, LookupError, TypeError):
            result.skipped[-1].reason += "; the learning rate is our default: set optimizer.learning_rate"


def scheduled(given: Any, iters: int) -> tuple[dict[str, str], dict[str, Any], str]:
    """Return our groups, our settings and a note for an lr_schedule, in a run of `iters` updates.

    Raises:
        CannotImport: it has no equal here.
    """
    arguments = given.get("arguments") if isinstance(given, Mapping) else None
    if not isinstance(arguments, (list, tuple)) or not arguments:
        raise CannotImport("it is not a mapping with a name and a list of arguments")
    name = str(given.get("name"))
    peak, warmup = to_float(arguments[0]), to_int(given.get("warmup") or 0)
    if warmup < 0:
        raise CannotImport("its warmup is negative")
    if warmup and to_float(given.get("warmup_init") or 0):
        raise CannotImport("the warmup here starts at zero, not at warmup_init: import it without warmup_init")
    rise, note = 0, "counted in updates, there as well"
    if warmup:
        rise = warmup + 1
        note = f"{rise} updates here for a warmup of {warmup}: there the first has rate zero and the peak comes twice; "
        note += f"equal from update {rise + 1} on"
    if name in ("exponential_decay", "step_decay") and len(arguments) > 1 and to_float(arguments[1]) == 1:
        values = {"optimizer.learning_rate": peak}
        if warmup:
            values |= {"schedule.iters": max(iters, rise + 1), "schedule.warmup": rise}
        return {"schedule": "constant"}, values, note
    if name == "step_decay" and len(arguments) == 3:
        values = {"optimizer.learning_rate": peak, "schedule.warmup": rise}
        values |= {"schedule.gamma": to_float(arguments[1]), "schedule.step_size": to_int(arguments[2])}
        if rise:
            values["schedule.iters"] = max(iters, rise + 1)
        return {"schedule": "step"}, values, note
    if name == "exponential_decay" and len(arguments) == 2:
        return _exponential(peak, to_float(arguments[1]), rise, iters, note)
    if name not in _SHAPES:
        there = ", ".join(map(str, schema.metadata()["schedule.name"].choices))
        raise CannotImport(f"{name} is not there yet ({there}): schedule=cosine falls smoothly to schedule.end")
    order = (1, 2) if name == "cosine_decay" else (2, 1)
    if len(arguments) != 3 and not (name == "cosine_decay" and len(arguments) == 2):
        raise CannotImport(f"{name} has other arguments in mlx")
    steps = to_int(arguments[order[0]])
    end = to_float(arguments[order[1]]) if len(arguments) == 3 else 0.0
    if steps < 1:
        raise CannotImport("it must have 1 step or more")
    if name == "linear_schedule" and peak == 0 and not warmup:
        # A rise from zero is what a warmup is.
        values = {"optimizer.learning_rate": end, "schedule.iters": max(iters, steps + 1), "schedule.warmup": steps}
        return {"schedule": "constant"}, values, "a rise from zero is a warmup here, whose first update is not at zero"
    last = steps + rise + 1
    if last > iters:
        note += f"; the run ends at update {iters}, before the schedule does at {last}"
    values = {"optimizer.learning_rate": peak, "schedule.iters": last, "schedule.warmup": rise, "schedule.end": end}
    return {"schedule": _SHAPES[name]}, values, note


def _exponential(
    peak: float, factor: float, rise: int, iters: int, note: str
) -> tuple[dict[str, str], dict[str, Any], str]:
    """Convert a factor per update to the rate that it leads to at the last update of the run."""
    last = max(iters, rise + 2)
    try:
        end = peak * factor ** (last - rise - 1)
    except OverflowError:
        end = math.inf
    if factor <= 0 or not 0 < end < math.inf:
        raise CannotImport(f"exponential_decay by {factor} does not reach a positive rate at update {last}")
    values = {"optimizer.learning_rate": peak, "schedule.iters": last, "schedule.warmup": rise, "schedule.end": end}
    return {"schedule": "exponential"}, values, f"{note}; the rate stays at schedule.end after update {last}"


def _computes_its_rate(result: ImportResult) -> bool:
    """Return whether the optimizer there is Adafactor with its own learning rate, which is its default."""
    if str(result.value("optimizer")).lower() != "adafactor":
        return False
    return _adafactor_options(result).get("relative_step", not result.our_defaults) is True


def _relative_step(result: ImportResult) -> None:
    """Import the learning rate that MLX's Adafactor computes, as a schedule."""
    for key in ("learning_rate", "lr_schedule"):
        result.explain(key, "not used there: adafactor computes its own rate unless relative_step is false")
    rate, updates = _RELATIVE_STEP_RATE, _RELATIVE_STEP_UPDATES
    iters = result.values.get("train.iters", schema.TrainConfig().iters)
    key, values, groups = "optimizer_config.adafactor.relative_step", {"optimizer.learning_rate": rate}, {}
    note = "the rate that adafactor computes there"
    if _adafactor_options(result).get("warmup_init") is True:
        groups = {"schedule": "inverse_sqrt"}
        values |= {"schedule.warmup": updates - 1, "schedule.timescale": updates, "schedule.iters": max(iters, updates)}
    elif iters > updates:
        note += f", until update {updates:,}; there it falls after it with the square root of the updates"
    result.add(key, True, values, groups, note, explicit=False)


def _adafactor_options(result: ImportResult) -> Mapping[str, Any]:
    sections = result.source.settings.get("optimizer_config")
    options = sections.get("adafactor") if isinstance(sections, Mapping) else None
    return options if isinstance(options, Mapping) else {}


def _options(result: ImportResult, used: str, given: Any) -> None:
    if given is not None and not isinstance(given, dict):
        result.skip(f"optimizer_config.{used}", "it is not a mapping of options", given)
        given = None
    given = {str(k): v for k, v in (given or {}).items()}
    takes = schema.choice_options("optimizer", used)
    for option in [o for o in _OPTIONS if o in given] + sorted(set(given) - set(_OPTIONS)):  # momentum before nesterov
        key, value = f"optimizer_config.{used}.{option}", given[option]
        try:
            if option == "dampening" and not to_float(value):
                continue
            if used == "adafactor" and option in ("relative_step", "warmup_init"):
                continue  # see _relative_step
            if used == "adafactor" and option == "eps":
                value = _first_epsilon(value)
            ours = _RENAMED.get(option, option)
            if ours not in takes:
                raise CannotImport(f"optimizer={used} has no such option here ({', '.join(takes)})")
            result.add(key, value, {f"optimizer.{ours}": _OPTIONS[option](value)})
        except CannotImport as reason:
            result.skip(key, f"{reason}", value)
    option, default, note = _THEIR_DEFAULTS.get(used, ("", None, ""))
    if option and option not in given and not result.our_defaults:
        result.add(f"optimizer_config.{option}", default, {f"optimizer.{option}": default}, note=note, explicit=False)


def _first_epsilon(value: Any) -> float:
    """Return the first of Adafactor's two epsilons; the second is fixed here. Raises CannotImport where it differs."""
    epsilons = to_floats(value)
    if len(epsilons) != 2 or epsilons[1] != 1e-3:
        raise CannotImport("here its second value is always 0.001")
    return epsilons[0]
