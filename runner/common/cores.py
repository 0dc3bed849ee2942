"""The number of CPU cores that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from runner.common.control_groups import control_groups


def usable_cores(root: Path = Path("/")) -> int:
    """Return the cores in this process's CPU affinity, capped by the quotas of its control groups (v1 and v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPU quota, in cores, of every control group above this process that has one."""
    for version, folder in control_groups("cpu", root):
        if version == 2:
            yield from _read_quota(folder / "cpu.max")
        else:
            yield from _read_quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")


def _read_quota(*files: Path) -> Iterator[float]:
    """Yield quota / period from one file with both numbers or two with one each; nothing where there is no limit."""
    try:
        quota, period = (float(number) for file in files for number in file.read_text().split())
    except (OSError, ValueError):
        return
    if quota > 0 and period > 0:
        yield quota / period
