"""Run and measure programs as a user starts them, and call our own modules that need MLX in a process of their own.

The measuring process itself never loads MLX: on Linux a child's peak of resident memory starts at its parent's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Measurement:
    """The cost of one process."""

    seconds: float
    """Wall-clock time from its start to its end."""
    rss_gb: float
    """Its peak resident memory."""
    load: float
    """The machine's load average over a minute, when it started."""
    others: float | None
    """Cores that other processes, or other machines on the same host, kept busy meanwhile; None where unknown."""


class ProcessFailed(Exception):
    """Raised for a process that failed, with the end of its output."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment, with the clone importable and without network access."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **(extra or {})}


def run_measured(command: Sequence[str], *, extra: Mapping[str, str], log: Path, limit: float) -> Measurement:
    """Run `command` to its end, its output into `log`.

    Raises:
        ProcessFailed: it ended with an error, or took longer than `limit` seconds.
    """
    load, busy, begun = os.getloadavg()[0], _busy(), time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=log.parent, env=environment(extra), stdout=out, stderr=out)
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            # Not process.wait(): only wait4 tells the resources of this one child.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            timer.cancel()
    seconds, after = time.perf_counter() - begun, _busy()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        late = f" (after {seconds:.0f} s; the limit is {limit:.0f} s)" if seconds >= limit else ""
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise ProcessFailed(f"{' '.join(command)}\nended with {process.returncode}{late}; see {log}\n{tail}")
    own = usage.ru_utime + usage.ru_stime
    others = None if busy is None or after is None else max(0.0, (after - busy - own) / seconds)
    unit = 1 if sys.platform == "darwin" else 1024
    return Measurement(seconds, usage.ru_maxrss * unit / 1e9, load, others)


def call_module(module: str, *arguments: str, limit: float = 1800) -> Any:
    """Run ``python -m benchmarks.MODULE ARGUMENTS…`` and return its last line, parsed as JSON.

    Raises:
        ProcessFailed: it ended with an error.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise ProcessFailed(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_cli_silently(overrides: Sequence[str]) -> None:
    """Run `runner` with `overrides` in this process, its output discarded; exit where it fails."""
    from runner.__main__ import main as cli

    stdout, devnull = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    try:
        code = cli(list(overrides))
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
    if code:
        sys.exit(code)


def _busy() -> float | None:
    """Return the seconds that all cores together were busy since boot, including time stolen by the host (Linux)."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
