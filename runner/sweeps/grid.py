"""From the words of a sweep to its jobs: which overrides each has, and the identity that follows from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from hydra.core.override_parser.types import Override, RangeSweep

from runner.common.errors import ConfigError
from runner.config.invocation import Invocation
from runner.config.quoting import quote_path

MOST_JOBS = 10_000


def expand_grid(overrides: Sequence[Override]) -> list[tuple[str, ...]]:
    """The overrides of every job: the product of all swept values, the first word varying slowest.

    A key that is said twice counts with its last word. Lists, ranges, choices and globs are expanded by Hydra's own
    parser; an interval needs a sweeper that draws from it.

    Raises:
        ConfigError: an interval, a glob that matches nothing, or more jobs than anyone can want.
    """
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise ConfigError(f"{override.input_line}: an interval has no values to try; list some or use range().")
            found = override.value()
            if isinstance(found, RangeSweep) and _count(found) > MOST_JOBS:
                raise ConfigError(f"{override.input_line}: a sweep of more than {MOST_JOBS:,} jobs is refused.")
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if not values:
                raise ConfigError(f"{override.input_line} matches nothing.")
        else:
            values = [f"{key}={override.get_value_element_as_str()}"]
        choices.pop(key, None)
        choices[key] = list(dict.fromkeys(values))
    if math.prod(map(len, choices.values())) > MOST_JOBS:
        raise ConfigError(f"A sweep of more than {MOST_JOBS:,} jobs is refused: try fewer values at once.")
    return list(itertools.product(*choices.values()))


def _count(found: RangeSweep) -> float:
    assert found.start is not None and found.stop is not None
    return abs(found.stop - found.start) / max(abs(found.step), 1e-300)


_NOT_KEPT = (
    "stored",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.run.dir",
    "hydra.mode",
)
"""Words that belong to one invocation, or that a sweep sets itself."""


def stored_overrides(invocation: Invocation) -> list[str]:
    """Return what a sweep's manifest keeps of the command line, so that the sweep can be finished without it."""
    repeat = [] if invocation.repeat is None else [f"repeat={quote_path(str(invocation.repeat))}"]
    arguments = [a for a in invocation.arguments if a not in ("-m", "--multirun") and _key(a) not in _NOT_KEPT]
    return [*repeat, *arguments]


def merge_overrides(stored: Sequence[str], typed: Sequence[str]) -> list[str]:
    """The words of a sweep when it is resumed: a key typed again replaces the stored one, new ones are added."""
    said = {_key(word): word for word in stored}
    said.update({_key(word): word for word in typed})
    return list(said.values())


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]
