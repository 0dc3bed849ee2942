"""Values of another program's config converted to the types of our settings, and shown to a person."""

from __future__ import annotations

import re
from typing import Any

from runner.common.text import printable
from runner.config import schema, validation
from runner.config.quoting import scalar_text

# Plain YAML 1.1 reads 1e-5 as text; mlx-lm's own loader, and ours, as a number.
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")


class CannotImport(Exception):
    """Raised for a value that has no equal here; the text is the reason."""


def to_float(value: Any) -> float:
    """Return a number as float. Raises CannotImport for anything else."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value.replace("_", ""))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CannotImport("it is not a number")
    try:
        return float(value)
    except OverflowError:
        raise CannotImport("it is too large") from None


def to_int(value: Any) -> int:
    """Return a whole number as int. Raises CannotImport for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = to_float(value)
    if not number.is_integer():
        raise CannotImport("it is not a whole number")
    return int(number)


def to_bool(value: Any) -> bool:
    """Return a truth value. Raises CannotImport for anything else."""
    if not isinstance(value, bool):
        raise CannotImport("it is neither true nor false")
    return value


def to_text(value: Any) -> str:
    """Return a text that can be typed on a command line. Raises CannotImport for anything else."""
    if not isinstance(value, str) or not value:
        raise CannotImport("it is not a text" if not isinstance(value, str) else "it is empty")
    if not value.isprintable():
        raise CannotImport("it holds characters that cannot be typed")
    if "${" in value or value == schema.MISSING:
        raise CannotImport(f"'{'${' if '${' in value else value}' has a meaning of its own in our settings")
    if list(validation.secrets_in({"": value})):
        raise CannotImport("it looks like a secret, and settings are stored in the run directory")
    return value


def to_texts(value: Any) -> list[str]:
    """Return a list of texts. Raises CannotImport for anything else."""
    return [to_text(item) for item in _list(value)]


def to_floats(value: Any) -> list[float]:
    """Return a list of numbers. Raises CannotImport for anything else."""
    return [to_float(item) for item in _list(value)]


def display(value: Any, limit: int = 60) -> str:
    """Return a value of the other program for a person: short, safe for a terminal, and never a secret."""
    if list(validation.secrets_in({"": value})):
        return "(not shown)"
    text = printable(scalar_text(value)).replace("\n", "·")
    return text if len(text) <= limit else f"{text[:limit]}…"


def _list(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise CannotImport("it is not a list")
    return list(value)
