"""From the words of a sweep to its jobs: which overrides each has, and the identity that follows from them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence

from hydra.core.override_parser.types import Override, RangeSweep

from runner.common.errors import ConfigError

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


def job_id(overrides: Sequence[str]) -> str:
    """Identity of a job: of the set of its overrides, whatever their order; those of one invocation do not count."""
    own = sorted(word for word in overrides if not _of_the_invocation(word))
    return hashlib.blake2b(json.dumps(own).encode(), digest_size=8).hexdigest()


_NOT_KEPT = (
    "resume",
    "train.stop_at",
    "stored",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.run.dir",
    "hydra.mode",
)
"""Words that belong to one invocation, or that a sweep sets itself."""


def stored_overrides(words: Sequence[str]) -> list[str]:
    """The words that a sweep's manifest keeps, so that it can be finished without typing them again."""
    return [word for word in words if word not in ("-m", "--multirun") and _key(word) not in _NOT_KEPT]


def merge_overrides(stored: Sequence[str], typed: Sequence[str]) -> list[str]:
    """The words of a sweep when it is resumed: a key typed again replaces the stored one, new ones are added."""
    said = {_key(word): word for word in stored}
    said.update({_key(word): word for word in typed})
    return list(said.values())


def _of_the_invocation(word: str) -> bool:
    return _key(word).startswith(("hydra.", "hydra/")) or _key(word) in _NOT_KEPT


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]
