"""The space that a search draws from: Hydra's sweep overrides as dimensions, and a suggested value as an override."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from runner.common.errors import ConfigError
from runner.config import schema
from runner.sweeps import grid
from runner.sweeps.search.dimensions import Choices, Interval, Value, without_noise

_INT = re.compile(r"[-+]?\d{1,18}")
_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.?\d+)(e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Space:
    """What a search varies, and what all its trials share."""

    dimensions: Mapping[str, Choices | Interval]
    """By the key of the override."""
    fixed: tuple[str, ...]
    """Overrides that all trials have."""
    texts: Mapping[str, str]
    """Key to the override's value as typed."""
    has_groups: bool = False
    """Whether a dimension chooses from a group of configs."""

    @property
    def size(self) -> float:
        """How many combinations there are; infinite where a dimension is continuous."""
        return math.prod(dimension.size for dimension in self.dimensions.values())

    def with_fixed(self, override: str) -> Space:
        """Return the space with another override that all trials have, in place of one of the same key."""
        kept = [text for text in self.fixed if grid.override_identity(text) != grid.override_identity(override)]
        return replace(self, fixed=(*kept, override))

    def combinations(self) -> list[dict[str, Value]]:
        """Return all combinations, the first dimension varying slowest.

        Raises:
            ConfigError: a dimension is continuous, or there are too many.
        """
        if self.size > grid.MAX_JOBS:
            endless = [key for key, dimension in self.dimensions.items() if math.isinf(dimension.size)]
            if endless:
                raise ConfigError(
                    f"hydra.sweeper.sampler=grid tries every value, and {endless[0]}={self.texts[endless[0]]} has no "
                    "end of them: list values, use range(), or take another sampler."
                )
            raise ConfigError(f"A grid of more than {grid.MAX_JOBS:,} trials is refused: try fewer values at once.")
        values = [dimension.values() for dimension in self.dimensions.values()]
        return [dict(zip(self.dimensions, chosen, strict=True)) for chosen in itertools.product(*values)]

    def extremes(self) -> list[dict[str, Value]]:
        """Return parameters that together hold every choice and both ends of every interval, one dimension changed at a
        time."""
        ends = {key: dimension.ends() for key, dimension in self.dimensions.items()}
        first = {key: values[0] for key, values in ends.items()}
        return [first, *({**first, key: value} for key, values in ends.items() for value in values[1:])]

    def overrides(self, params: Mapping[str, Value]) -> list[str]:
        """Return the parameters as overrides."""
        return [f"{key}={self.dimensions[key].text(value)}" for key, value in params.items()]

    def contains(self, params: Mapping[str, Value]) -> bool:
        """Return whether the parameters are a point of the space."""
        return params.keys() == self.dimensions.keys() and all(
            self.dimensions[key].contains(value) for key, value in params.items()
        )


def make_space(
    overrides: Sequence[Override],
    is_group: Callable[[Override], bool] = lambda _: False,
    references: Callable[[], Mapping[str, Any]] = dict,
) -> Space:
    """Return the space of a search's overrides; of two of one key the last counts.

    Args:
        overrides: of the whole search.
        is_group: returns whether an override chooses from a group of configs.
        references: returns the settings that refer to others, as written: they say what a variable is used for.

    Raises:
        ConfigError: nothing is varied, or an override has no values.
    """
    dimensions: dict[str, Choices | Interval] = {}
    fixed: dict[tuple[str, bool], str] = {}
    texts: dict[str, str] = {}
    groups: set[str] = set()
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            text = f"{key}={override.get_value_element_as_str()}"
            dimensions.pop(key, None)
            fixed.pop(grid.override_identity(text), None)
            fixed[grid.override_identity(text)] = text
            continue
        for identity in [found for found in fixed if found[0] == grid.override_key(key)]:
            del fixed[identity]
        dimensions[key] = _dimension(override, references)
        if is_group(override):
            groups.add(key)
        texts[key] = (override.input_line or "").partition("=")[2]
    if not dimensions:
        raise ConfigError(
            "A search needs a setting to vary: lora.rank=4,8,16 or "
            "'optimizer.learning_rate=tag(log,interval(1e-5,1e-2))'."
        )
    if "experiment" in dimensions:
        raise ConfigError(
            "experiment= cannot be searched over, since a recipe may set anything: vary the settings themselves, or "
            "run a grid."
        )
    has_groups = not groups.isdisjoint(dimensions)
    return Space(dimensions, tuple(fixed.values()), {key: texts[key] for key in dimensions}, has_groups)


def _dimension(override: Override, references: Callable[[], Mapping[str, Any]]) -> Choices | Interval:
    swept, line = override.value(), override.input_line
    if isinstance(swept, IntervalSweep):
        return _interval(swept, line or "", _number_type(override, references))
    if isinstance(swept, RangeSweep) and _number_type(override, references) is not None:
        start, stop, step = swept.start, swept.stop, swept.step
        assert start is not None and stop is not None
        count = math.ceil((stop - start) / step - 1e-9) if step else 0
        if 0 < count <= grid.MAX_JOBS and step > 0:
            is_int = all(isinstance(number, int) for number in (start, stop, step))
            return Interval(start, without_noise(start + (count - 1) * step), is_int, log=False, step=step)
    texts = list(dict.fromkeys(override.sweep_string_iterator()))
    if not texts:
        raise ConfigError(f"{line} matches nothing.")
    values = [_parse(text) for text in texts]
    if len(set(map(repr, values))) < len(texts):
        values = list(texts)
    return Choices(tuple(values), tuple(texts))


def _number_type(override: Override, references: Callable[[], Mapping[str, Any]]) -> type | None:
    """Return int or float where an override sets a number, else None: by the type of its setting.

    The setting of a variable is the first one that refers to it.
    """
    name, settings = override.key_or_group, schema.metadata()
    if name not in settings:
        users = (user for user, text in references().items() if text == f"${{{name}}}" and user in settings)
        name = next(users, name)
    return schema.number_type(name)


def _interval(swept: IntervalSweep, line: str, number_type: type | None) -> Interval:
    low, high, tags = swept.start, swept.end, set(swept.tags or ())
    if unknown := tags - {"log"}:
        raise ConfigError(f"{line}: a search knows the tag log, not {', '.join(sorted(unknown))}.")
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)) or low >= high:
        raise ConfigError(f"{line}: an interval goes from a lower to a higher number.")
    if "log" in tags and low <= 0:
        raise ConfigError(f"{line}: with tag(log) an interval begins above 0.")
    is_int = isinstance(low, int) and isinstance(high, int)
    if number_type is int and low == int(low) and high == int(high):
        is_int = True  # Hydra makes floats of interval(4,64), also for a setting that is a whole number
    if is_int:
        return Interval(int(low), int(high), True, "log" in tags, None if "log" in tags else 1)
    return Interval(float(low), float(high), False, "log" in tags)


def _parse(text: str) -> Value:
    """Return a plain number, truth value or null of Hydra's grammar; any other text as it is."""
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return {"true": True, "false": False, "null": None}.get(text.lower(), text)
