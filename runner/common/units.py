"""Durations and sizes as people type them: `2h`, `30d`, `500MB`."""

from __future__ import annotations

import re
from collections.abc import Mapping

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
"""Seconds of each unit of a duration."""
BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
"""Bytes of each unit of a size."""
_QUANTITY = re.compile(r"(?P<number>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)\s*(?P<unit>[A-Za-z]*)", re.IGNORECASE)


def parse_quantity(text: str, units: Mapping[str, float], default: float | None = None) -> float | None:
    """Return the number that `text` is, times that of its unit among `units`; None where it is none.

    Args:
        default: what a number without a unit is multiplied by; None where it needs one.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    factor = units.get(match["unit"].lower()) if match["unit"] else default
    return None if factor is None else float(match["number"]) * factor
