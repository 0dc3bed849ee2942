"""Who a rank is, as it tells rank 0 when it joins: its place, its machine, and the code that it runs."""

from __future__ import annotations

import os
import platform
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from runner import __version__
from runner.common.text import shorten
from runner.distributed.frames import ConnectionLost


@dataclass(frozen=True, kw_only=True)
class RankIdentity:
    """A rank of a run."""

    rank: int
    size: int
    """Number of ranks of its run."""
    host: str
    pid: int
    version: str
    """Of runner."""
    code: int
    """Checksum of its source files: two copies of one version may differ."""
    problem: str | None = None
    """Why it cannot take part."""

    @classmethod
    def own(cls, rank: int, size: int, problem: str | None = None) -> RankIdentity:
        """Return that of this process."""
        code = {"version": __version__, "code": source_checksum()}
        return cls(rank=rank, size=size, host=platform.node(), pid=os.getpid(), problem=problem, **code)  # type: ignore[arg-type]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> RankIdentity:
        """Return that of another process. Raises ConnectionLost where it is none."""
        try:
            problem = told.get("problem")
            return cls(
                rank=int(told["rank"]),
                size=int(told["size"]),
                host=shorten(told["host"], 200),
                pid=int(told["pid"]),
                version=shorten(told["version"], 100),
                code=int(told.get("code", 0)),
                problem=None if problem is None else shorten(problem, 1000),
            )
        except (KeyError, TypeError, ValueError):
            raise ConnectionLost("it did not say who it is") from None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def as_json(self) -> dict[str, Any]:
        """Return what `of` reads."""
        return asdict(self)

    def difference(self, other: RankIdentity) -> str | None:
        """Return why `other` is no rank of the run whose rank 0 this is; None where it is one."""
        if other.version != self.version:
            return f"it has version {other.version} of runner, and rank 0 has {self.version}"
        if other.size != self.size or other.rank not in range(1, self.size):
            return f"it was started as rank {other.rank} of {other.size}, and the run has {self.size} ranks"
        if other.code != self.code:
            return f"its source files of runner {other.version} differ from rank 0's: every machine needs the same"
        return None


@cache
def source_checksum() -> int:
    """Return a checksum of the package's source files, read once by a process."""
    package, checksum = Path(__file__).parent.parent, 0
    for path in sorted((path for kind in ("py", "c") for path in package.rglob(f"*.{kind}")), key=lambda p: p.parts):
        checksum = zlib.crc32(path.read_bytes(), zlib.crc32(path.relative_to(package).as_posix().encode(), checksum))
    return checksum
