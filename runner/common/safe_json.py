"""JSON from files that may be damaged or hostile: bounded in memory and time, without duplicate keys.

Python's own parser keeps the last of two equal keys, takes NaN, and can be made to build many times the size
of its input; here each of these is a reason to refuse.
"""

from __future__ import annotations

import json
from typing import Any

_LONGEST_INTEGER = 20
_LONGEST_FLOAT = 64


def parse(text: bytes, *, most_values: int) -> Any:
    """The value that `text` (UTF-8, no byte order mark) holds.

    `most_values` bounds the number of commas and opening brackets, so that memory is bounded before anything
    is built. Raises ValueError with the reason: not UTF-8, not JSON, a duplicate key, a number that is not
    finite or is absurdly long, nesting too deep, too many values.
    """
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > most_values:
        raise ValueError(f"it holds more than {most_values:,} values")
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


def quoted(name: object) -> str:
    """`name` quoted for a message: escaped, and cut where it is long."""
    text = ascii(name)
    return text if len(text) <= 80 else f"{text[:60]}…{text[-10:]}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {quoted(key)} appears twice")
            seen.add(key)
    return found


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_INTEGER:
        raise ValueError(f"it holds an integer of {len(digits):,} digits")
    return int(digits)


def _float(digits: str) -> float:
    if len(digits) > _LONGEST_FLOAT:
        raise ValueError(f"it holds a number of {len(digits):,} characters")
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits} is not finite")
    return value


def _constant(word: str) -> float:
    raise ValueError(f"the number {word} is not finite")
