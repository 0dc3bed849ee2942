"""How a stranger's files are brought to the program: through its commands, and past `measure.py`. Loaded by path."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS, BYTES = 1.0, 200_000_000
"""Of CPU time and memory, in which what is hostile is refused."""
_MEASURE = Path(__file__).resolve().with_name("measure.py")


def invoke(cli: Any, *arguments: str, expect: tuple[int, ...] = (2,), env: dict[str, str] | None = None) -> str:
    """What the program says; nothing ran, nothing was written where it was not typed."""
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    process = cli.start(*arguments, env=env or {})
    out, _ = process.communicate(timeout=120)
    assert process.returncode in expect, out
    assert "Traceback" not in out and all(len(line) < 3000 for line in out.splitlines()), out
    assert not _marks(cli.folder)
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before < 10  # its own start is a part of it
    return out


def _marks(folder: Path) -> list[Path]:
    """What hostile code would have made: in `folder`, and where ``../ran`` and ``../../ran`` lead from there."""
    above = [path for path in (folder.parent / "ran", folder.parent.parent / "ran") if path.exists()]
    return [*folder.rglob("ran*"), *above]


def measure(reader: str, paths: list[Path], environment: dict[str, str]) -> list[dict[str, Any]]:
    """What each of `paths` costs the reader of that name; one that ends the process fails the test."""
    done = subprocess.run(
        [sys.executable, str(_MEASURE), reader, *map(str, paths)],
        env=environment,
        capture_output=True,
        text=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(paths), f"{paths[len(found)]} ended the process: {done.returncode}\n{done.stderr[-2000:]}"
    return found
