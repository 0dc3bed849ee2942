"""The time of day, as the files of a run record it."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime


def utc_now() -> str:
    """Return the time (UTC) as text, to the second: ``2026-11-24T10:00:00Z``."""
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_utc(text: object) -> float | None:
    """Return the seconds since 1970 of a text of `utc_now`; None where it is none."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def today() -> date:
    """Return the day, in local time."""
    return datetime.fromtimestamp(time.time()).date()
