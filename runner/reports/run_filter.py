"""Filters of a listing, such as `valid_loss<0.5`, `lora.rank>=8`, `state=finished` or `model.path~qwen`, and its order.

A filter is one comparison. It is parsed by a pattern, and nothing that was typed is evaluated.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from runner.common.errors import ConfigError, did_you_mean
from runner.common.layout import STATES
from runner.common.text import shorten
from runner.common.units import BYTES, SECONDS, parse_quantity
from runner.config import schema
from runner.reports import settings_text
from runner.reports.fields import DURATION, FIELDS, NUMBER, SIZE, TEXT, WORDS, Field, find_field
from runner.runs.inspect import RunInfo

_FILTER = re.compile(
    r"\s*(?P<field>[A-Za-z_][\w.]*)\s*(?P<operator><=|>=|==|!=|!~|[<>=~])\s*(?P<value>.*?)\s*", re.DOTALL
)
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_EXAMPLES = {DURATION: "2h or 30d", SIZE: "500MB"}
_LARGEST_FIRST = ("size", "step")
"""Words of --sort that begin with the largest value; all others begin with the smallest."""


@dataclass(frozen=True)
class Filter:
    """One comparison of a field with a value, or for `=` and `!=` with several: `rank=8,16` is one of them."""

    field: Field
    operator: str
    value: str
    """As typed."""

    @property
    def values(self) -> list[str]:
        """The values of which one has to be that of the run; a list, such as `[0.9,0.999]`, is one value."""
        is_list = self.operator not in ("=", "!=") or self.value.startswith("[")
        return [self.value] if is_list else list(dict.fromkeys([self.value, *map(str.strip, self.value.split(","))]))

    def accepts(self, run: RunInfo) -> bool:
        """Return whether it holds for `run`. A run without the value passes only what excludes: != and !~."""
        found, symbol = self.field.value(run), {"!=": "=", "!~": "~"}.get(self.operator, self.operator)
        holds = any(_holds(self.field, symbol, value, found) for value in self.values)
        return not holds if self.operator in ("!=", "!~") else holds


@dataclass(frozen=True)
class SortKey:
    """The order of a listing."""

    field: Field
    descending: bool

    def key(self, runs: Sequence[RunInfo]) -> tuple[bool, Any]:
        """Return what `sorted` orders entries by, for a run or for all jobs of a sweep: those without a value last.

        Of a sweep the value counts that comes first in this order; sizes and steps are added up.
        """
        values = [_sortable(value) for run in runs if (value := self.field.value(run)) not in (None, ())]
        if not values:
            return (True, ())
        if self.field.name in _LARGEST_FIRST:
            values = [(0, sum(number for _, number, _ in values), "")]
        best = max(values) if self.descending else min(values)
        return (False, _Reversed(best) if self.descending else best)


def looks_like_filter(text: str) -> bool:
    """Return whether `text` has the form of a filter."""
    return _FILTER.fullmatch(text) is not None


def resembles_filter(text: str) -> bool:
    """Return whether `text` has an operator, so that it may have been meant as a filter."""
    return any(symbol in text for symbol in "<>=~")


def parse_filter(text: str, runs: Sequence[RunInfo] = ()) -> Filter:
    """Parse one filter; `runs` as in `find_field`.

    Raises:
        ConfigError: it is no comparison, there is no such field, or the field cannot be compared so.
    """
    match = _FILTER.fullmatch(text)
    if match is None:
        raise ConfigError(f"'{shorten(text)}' is no filter: type one as 'valid_loss<0.5' or 'lora.rank>=8'.")
    symbol, value = match["operator"].replace("==", "="), match["value"]
    field = find_field(match["field"], runs, f"'{shorten(text)}'")
    if not value:
        raise ConfigError(f"'{shorten(text)}' has no value behind {match['operator']}.")
    if symbol in _ORDER and field.kind in (TEXT, WORDS):
        raise ConfigError(f"'{shorten(text)}': {field.name} is a text: compare it with =, !=, ~ (contains) or !~.")
    is_number = field.kind in (NUMBER, DURATION, SIZE) or field.name in schema.numeric_settings()
    needs_number = symbol in _ORDER or (is_number and symbol in ("=", "!="))
    parsed = Filter(field, symbol, value)
    values = [found for found in parsed.values if found != value or len(parsed.values) == 1]
    if needs_number and not all(_is_null(found) or _number(field.kind, found) is not None for found in values):
        example = f", such as {_EXAMPLES[field.kind]}" if field.kind in _EXAMPLES else ""
        raise ConfigError(f"'{shorten(text)}': {field.name} is compared with a number{example}.")
    states = (*STATES, "unknown")
    unknown = [found for found in values if found not in states]
    if field is FIELDS["state"] and symbol in ("=", "!=") and unknown:
        raise ConfigError(
            f"state={shorten(unknown[0])}: a run is {', '.join(states)}.{did_you_mean(unknown[0], states)}"
        )
    return parsed


def parse_sort(text: str, runs: Sequence[RunInfo] = ()) -> SortKey:
    """Parse the word of --sort: a field, with `-` in front in the opposite order.

    Raises:
        ConfigError: there is no such field.
    """
    name = text.removeprefix("-")
    return SortKey(find_field(name, runs, f"--sort {shorten(text)}"), (name in _LARGEST_FIRST) != text.startswith("-"))


def tag_filters(tags: Sequence[str]) -> list[Filter]:
    """Return the filters of --tag: each run has every one of them."""
    return [Filter(FIELDS["tag"], "=", tag) for tag in tags]


def _holds(field: Field, symbol: str, typed: str, found: Any) -> bool:
    if field.kind == WORDS:
        return any(typed == word if symbol == "=" else typed.casefold() in word.casefold() for word in found)
    if found is None:
        return symbol == "=" and _is_null(typed)
    if symbol == "~":
        return typed.casefold() in settings_text.value_text(found).casefold()
    if isinstance(found, int | float) and not isinstance(found, bool):
        number = _number(field.kind, typed)
        if number is None:
            return False
        return _ORDER[symbol](found, number) if symbol in _ORDER else math.isclose(found, number, rel_tol=1e-9)
    return symbol == "=" and settings_text.value_text(found).replace(" ", "") == typed.replace(" ", "")


def _number(kind: str, text: str) -> float | None:
    """Return the number that `text` is, in seconds or bytes where the field has such a unit."""
    if kind == DURATION:
        return parse_quantity(text, SECONDS)
    return parse_quantity(text, BYTES if kind == SIZE else {}, default=1.0)


def _is_null(text: str) -> bool:
    return text in ("null", "none", "-")


def _sortable(value: Any) -> tuple[int, float, str]:
    """Return numbers before texts, so that values of different types can be compared."""
    if isinstance(value, int | float):
        return (0, float(value), "")
    text = " ".join(value) if isinstance(value, tuple) else settings_text.value_text(value)
    return (1, 0.0, text.casefold())


@dataclass(frozen=True)
class _Reversed:
    value: Any

    def __lt__(self, other: _Reversed) -> bool:
        return bool(other.value < self.value)
