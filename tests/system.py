"""What tests ask of the operating system, in ways that Linux and macOS share."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIMULATED = "simulated_macos" in sys.modules
"""Whether this is the simulated macOS of tests/darwin, where MLX computes on the CPU what a GPU is fast at."""


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make every write beyond the first `size` bytes of a file fail in this process, as on a full disk, with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def is_running(pid: int) -> bool:
    """Return whether there is a process `pid`, also one that has ended and whose parent has not noticed."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def parents() -> dict[int, int]:
    """Return the parent's pid of every process."""
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
        return dict(map(int, line.split()) for line in listed.stdout.splitlines())
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
    return found
