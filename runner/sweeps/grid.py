"""From the overrides of a sweep to those of its jobs, and what a sweep stores of its command line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hydra.core.override_parser.types import Override, RangeSweep

from runner.common.errors import ConfigError
from runner.config.invocation import Invocation
from runner.config.quoting import quote_text

MAX_JOBS = 10_000
_NOT_STORED = ("stored", "hydra.sweep.dir", "hydra.run.dir", "hydra.mode")
"""Settings that the program sets for each invocation of a sweep."""


def expand_grid(overrides: Sequence[Override]) -> list[tuple[str, ...]]:
    """Return the overrides of every job: the product of all swept values, the first override varying slowest.

    Of two overrides of one key the last counts; a choice of a group and a dict of its settings are two keys. Hydra's
    parser expands lists, ranges, choices and globs.

    Raises:
        ConfigError: an interval (only a sampling sweeper can draw from it), a glob without a match, or too many jobs.
    """
    choices: dict[tuple[str, bool], list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise ConfigError(f"{override.input_line}: an interval has no values to try; list some or use range().")
            swept = override.value()
            if isinstance(swept, RangeSweep) and _length(swept) > MAX_JOBS:
                raise ConfigError(f"{override.input_line}: a sweep of more than {MAX_JOBS:,} jobs is refused.")
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if not values:
                raise ConfigError(f"{override.input_line} matches nothing.")
        else:
            values = [f"{key}={override.get_value_element_as_str()}"]
        identity = override_identity(values[0])
        choices.pop(identity, None)
        choices[identity] = list(dict.fromkeys(values))
    if math.prod(map(len, choices.values())) > MAX_JOBS:
        raise ConfigError(f"A sweep of more than {MAX_JOBS:,} jobs is refused: try fewer values at once.")
    return list(itertools.product(*choices.values()))


def stored_arguments(invocation: Invocation) -> list[str]:
    """Return what a sweep's manifest stores of the command line, so that the sweep can be finished without it."""
    repeat = [] if invocation.repeat is None else [f"repeat={quote_text(str(invocation.repeat))}"]
    arguments = [
        a for a in invocation.arguments if a not in ("-m", "--multirun") and override_key(a) not in _NOT_STORED
    ]
    return [*repeat, *arguments]


def merge_arguments(stored: Sequence[str], typed: Sequence[str]) -> list[str]:
    """Return the arguments of a resumed sweep: those typed replace the stored ones of the same key, or are added."""
    merged = {override_key(argument): argument for argument in stored}
    merged.update({override_key(argument): argument for argument in typed})
    return list(merged.values())


def override_key(argument: str) -> str:
    """Return the key of an override or of a flag with a value."""
    return argument.lstrip("+").partition("=")[0]


def override_identity(override: str) -> tuple[str, bool]:
    """Return what the override sets: its key, and whether its value is a dict, which is not the choice of a group."""
    return override_key(override), override.partition("=")[2].startswith("{")


def _length(swept: RangeSweep) -> float:
    assert swept.start is not None and swept.stop is not None
    return abs(swept.stop - swept.start) / max(abs(swept.step), 1e-300)
