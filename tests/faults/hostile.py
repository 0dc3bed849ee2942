"""Give hostile files to the program: through its commands, and to single readers by `measure.py`. Loaded by path."""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path
from typing import Any

SECONDS, BYTES = 1.0, 200_000_000
"""CPU time and memory within which a hostile file must be refused."""
_MEASURE = Path(__file__).resolve().with_name("measure.py")


def invoke(cli: Any, *arguments: str, expect: tuple[int, ...] = (2,), env: dict[str, str] | None = None) -> str:
    """Run the program and return its output; check that it ran no code of the file and wrote nothing unexpected."""
    before = _seconds()
    process = cli.start(*arguments, env=env or {})
    out, _ = process.communicate(timeout=120)
    assert process.returncode in expect, out
    assert "Traceback" not in out and all(len(line) < 3000 for line in out.splitlines()), out
    assert not _canary_files(cli.folder)
    used = getattr(process, "seconds", None)  # of a forked one; else those of its start are included
    assert (_seconds() - before if used is None else used) < 10
    return out


def _seconds() -> float:
    """Return the CPU time of child processes that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _canary_files(folder: Path) -> list[Path]:
    """Return the files that hostile code would have written: in `folder`, its parent and its grandparent."""
    above = [path for path in (folder.parent / "ran", folder.parent.parent / "ran") if path.exists()]
    return [*folder.rglob("ran*"), *above]


def measure(cli: Any, reader: str, paths: list[Path]) -> list[dict[str, Any]]:
    """Return what reading each of `paths` cost, measured by `measure.py`; fail where a path ended the process."""
    process = cli.start(reader, *map(str, paths), words=(str(_MEASURE),), stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=600)
    results = [json.loads(line) for line in output.splitlines()]
    assert len(results) == len(paths), (
        f"{paths[len(results)]} ended the process: {process.returncode}\n{errors[-2000:]}"
    )
    return results
