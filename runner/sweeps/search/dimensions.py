"""The dimensions of a search's space: listed values, and numbers of an interval or a range."""

from __future__ import annotations

import math
from dataclasses import dataclass

Value = bool | int | float | str | None
"""A suggested value; a dict, a list or a quoted text is the text of the override."""
_DIGITS = 4
"""Significant digits of a value that is drawn from an interval."""
_STEP_ERROR = 1e-6
"""How far, in steps, a number may be from the values of a range that it counts as one of."""


def without_noise(number: float) -> float:
    """Return the number that a sum of decimal fractions means: 0.3 for 0.30000000000000004; a whole one as it is."""
    return number if isinstance(number, int) else float(f"{number:.12g}")


@dataclass(frozen=True)
class Choices:
    """A dimension of listed values, without an order."""

    choices: tuple[Value, ...]
    texts: tuple[str, ...]
    """Each of them in Hydra's grammar."""

    @property
    def size(self) -> float:
        """How many values there are."""
        return len(self.choices)

    def values(self) -> list[Value]:
        """Return all values."""
        return list(self.choices)

    def ends(self) -> list[Value]:
        """Return the values that are validated before a search starts: all."""
        return list(self.choices)

    def text(self, value: Value) -> str:
        """Return the value in Hydra's grammar."""
        return self.texts[[repr(known) for known in self.choices].index(repr(value))]

    def rounded(self, value: Value) -> Value:
        """Return the value."""
        return value

    def contains(self, value: Value) -> bool:
        """Return whether it is one of the values."""
        return repr(value) in map(repr, self.choices)


@dataclass(frozen=True)
class Interval:
    """A dimension of numbers from `low` to `high`, both included."""

    low: float
    high: float
    is_int: bool
    log: bool
    """Whether values are drawn evenly by their logarithm."""
    step: float | None = None
    """Distance of the values, which begin at `low`; None for any number."""

    @property
    def size(self) -> float:
        """How many values there are; infinite where any number counts."""
        if self.is_int:
            return (self.high - self.low) // (self.step or 1) + 1
        return math.inf if self.step is None else round((self.high - self.low) / self.step) + 1

    def values(self) -> list[Value]:
        """Return all values of one that has an end of them."""
        step = self.step or 1
        numbers = [self.low + i * step for i in range(int(self.size))]
        return [int(number) if self.is_int else without_noise(float(number)) for number in numbers]

    def ends(self) -> list[Value]:
        """Return the values that are validated before a search starts: the lowest and the highest."""
        return [int(self.low), int(self.high)] if self.is_int else [self.low, self.high]

    def text(self, value: Value) -> str:
        """Return the value in Hydra's grammar."""
        assert isinstance(value, int | float)
        return str(value)

    def rounded(self, value: Value) -> Value:
        """Return a suggested value with the digits that a person would type, within the interval."""
        if self.is_int or not isinstance(value, float):
            return value
        if self.step is not None:
            return without_noise(value)
        rounded = float(f"{value:.{_DIGITS}g}")
        return rounded if self.low <= rounded <= self.high else value

    def contains(self, value: object) -> bool:
        """Return whether it is one of the values."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        if self.is_int and int(value) != value:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return abs(steps - round(steps)) < _STEP_ERROR
