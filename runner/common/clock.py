"""The time of day, as the files of a run record it."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def utc_now() -> str:
    """The time as text, UTC, to the second."""
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
