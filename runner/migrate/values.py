"""Values of an old config: read as a type with a sentence where they are none, and written for Hydra and for YAML."""

from __future__ import annotations

import json
import re
from typing import Any

from runner.common.text import printable
from runner.config import schema, validation

# Plain YAML 1.1 reads 1e-5 as text; mlx-lm's own loader, and ours, as a number.
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")
_PLAIN = re.compile(r"[A-Za-z_./][\w/.:@%+-]*", re.ASCII)
_OTHER_TYPES = ("null", "true", "false", "inf", "nan")


class Cannot(Exception):
    """A value that cannot be carried over; the text is the reason."""


def number(value: Any) -> float:
    """Raises Cannot where `value` is no number."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value.replace("_", ""))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Cannot("it is not a number")
    try:
        return float(value)
    except OverflowError:
        raise Cannot("it is too large") from None


def whole(value: Any) -> int:
    """Raises Cannot where `value` is no whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = number(value)
    if not found.is_integer():
        raise Cannot("it is not a whole number")
    return int(found)


def truth(value: Any) -> bool:
    """Raises Cannot where `value` is neither true nor false."""
    if not isinstance(value, bool):
        raise Cannot("it is neither true nor false")
    return value


def text(value: Any) -> str:
    """Raises Cannot where `value` is no text, or one that cannot be typed on a command line."""
    if not isinstance(value, str) or not value:
        raise Cannot("it is not a text" if not isinstance(value, str) else "it is empty")
    if not value.isprintable():
        raise Cannot("it holds characters that cannot be typed")
    if "${" in value or value == schema.MISSING:
        raise Cannot(f"'{'${' if '${' in value else value}' has a meaning of its own in our settings")
    if list(validation.secrets_in({"": value})):
        raise Cannot("it looks like a secret, and settings are stored in the run directory")
    return value


def texts(value: Any) -> list[str]:
    """Raises Cannot where `value` is no list of texts."""
    if not isinstance(value, (list, tuple)):
        raise Cannot("it is not a list")
    return [text(item) for item in value]


def word(name: str, value: Any) -> str:
    """`name=value` as it is typed. The door quotes paths itself, where it takes them as they are."""
    as_it_is = (
        name in schema.path_settings() and value[0] not in "'\"[~" and value[-1] != "\\" and not _looks_typed(value)
    )
    return f"{name}={value if as_it_is else hydra_value(value)}"


def hydra_value(value: Any) -> str:
    """`value` as Hydra's grammar reads it back, text quoted where another type or a sign of the grammar lurks."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(hydra_value(item) for item in value)}]"
    if not isinstance(value, str):
        return _scalar(value)
    if _PLAIN.fullmatch(value) and not _looks_typed(value):
        return value
    # Inside quotes Hydra unescapes the quote itself, and a backslash only in front of one.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


def yaml_value(value: Any) -> str:
    """`value` as a YAML flow value that every YAML reader takes for the same type (JSON is one)."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(yaml_value(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else _scalar(value)


def shown(value: Any, limit: int = 60) -> str:
    """An old value for a person: short, harmless for a terminal, and never a secret."""
    if list(validation.secrets_in({"": value})):
        return "(not shown)"
    made = _scalar(value) if value is None or isinstance(value, (bool, float)) else str(value)
    made = printable(made).replace("\n", "·")
    return made if len(made) <= limit else f"{made[:limit]}…"


def _looks_typed(value: str) -> bool:
    return value.lower() in _OTHER_TYPES or bool(_NUMBER.fullmatch(value))


def _scalar(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
