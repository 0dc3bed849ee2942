"""JSON from files that may be damaged or hostile: bounded in memory and time, without duplicate keys.

Python's own parser keeps the last of two equal keys, accepts NaN, and can be made to build many times the size of its
input; here each of these is refused.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeGuard

_MAX_INTEGER_LENGTH = 20
_MAX_COUNT = 10**15
_MAX_FLOAT_LENGTH = 64


def parse(text: bytes, *, max_values: int) -> Any:
    """Return the value that `text` (UTF-8, no byte order mark) holds.

    Args:
        max_values: bound of the number of commas and opening brackets, checked before anything is built.

    Raises:
        ValueError: with the reason: not UTF-8, not JSON, a duplicate key, a number that is not finite or is too long,
            nesting too deep, too many values.
    """
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > max_values:
        raise ValueError(f"it holds more than {max_values:,} values")
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} (character {error.pos})") from None


def parse_object(text: bytes, *, max_values: int) -> dict[str, Any]:
    """Return the object that `text` holds; as `parse`, but raises ValueError for any other value too."""
    value = parse(text, max_values=max_values)
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def is_count(value: object) -> TypeGuard[int]:
    """Return whether `value` is a whole number from 0 of a sensible size, such as a step or a number of bytes."""
    return type(value) is int and 0 <= value < _MAX_COUNT


def finite_number(value: object) -> float | None:
    """Return `value` as a float where it is a finite number of a sensible size, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -1e300 < value < 1e300 else None


def to_json_values(data: Any) -> Any:
    """Return `data` in types that JSON has: NaN and infinities become None, and other types, such as paths, text."""
    if isinstance(data, Mapping):
        return {str(key): to_json_values(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [to_json_values(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if data is None or isinstance(data, (str, int)):
        return data
    return os.fspath(data) if isinstance(data, os.PathLike) else str(data)


def quoted(value: object) -> str:
    """Return `value` quoted for a message: escaped, and cut where it is long."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:60]}…{text[-10:]}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {quoted(repeated)} appears twice")
    return members


def _integer(digits: str) -> int:
    if len(digits) > _MAX_INTEGER_LENGTH:
        raise ValueError(f"it holds an integer of {len(digits):,} digits")
    return int(digits)


def _float(digits: str) -> float:
    if len(digits) > _MAX_FLOAT_LENGTH:
        raise ValueError(f"it holds a number of {len(digits):,} characters")
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits} is not finite")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"the number {name} is not finite")
