"""The Linux control groups of this process, which limit what it may use, as in a container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the version (1 or 2) and the folder of each control group of `controller` at and above this process.

    Inside a container the path may name a group that is itself mounted as the root: every parent is yielded.
    """
    mount = root / "sys/fs/cgroup"
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for hierarchy, controllers, group in (line.split(":", 2) for line in groups if line.count(":") >= 2):
        if hierarchy != "0" and controller not in controllers.split(","):
            continue
        version, base = (2, mount) if hierarchy == "0" else (1, mount / controller)
        relative = Path(group.lstrip("/"))
        yield from ((version, base / folder) for folder in [relative, *relative.parents])
