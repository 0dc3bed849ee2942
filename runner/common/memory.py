"""The memory that this process may still use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from runner.common.control_groups import control_groups


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that the machine has free or can free, capped by what the control groups of this process (v1 and
    v2) leave; half of the machine's memory where the system does not say."""
    return max(0, min([_free(root), *_left_in_groups(root)]))


def _free(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what each control group above this process leaves of its limit; cached files count as free."""
    for version, folder in control_groups("memory", root):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_number(folder / name) for name in names)
        if limit is not None and used is not None:
            yield limit - used + _cached_files(folder / "memory.stat")


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None


def _cached_files(file: Path) -> int:
    try:
        values = dict(line.split() for line in file.read_text().splitlines())
        return int(values.get("inactive_file", values.get("total_inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def resident_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process has; 0 where the system does not say."""
    try:
        return int((root / "proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
