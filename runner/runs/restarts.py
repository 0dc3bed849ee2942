"""Starting runs again whose process died: which ends count as deaths, when to give up, and what is recorded of them."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runner.common.atomic_io import open_text
from runner.common.clock import utc_now
from runner.common.commands import resume_command
from runner.common.errors import (
    EXIT_CONFIG,
    EXIT_GPU,
    EXIT_MEMORY,
    EXIT_RANK_LOST,
    EXIT_REPLACE,
    ConfigError,
    GaveUp,
    RunnerError,
)
from runner.common.layout import STEP_NAME
from runner.common.safe_json import is_count
from runner.common.text import relative_path, shorten, single_line
from runner.runs.directory import RunDirectory
from runner.runs.rows import read_rows

MAX_DEATHS = 3
"""Deaths in a row, without a new checkpoint, after which a run is not started again."""
CHECKPOINTING = "train.grad_checkpoint"
"""The setting that saves memory and leaves the result equal."""
_MEMORY, _GPU, _REPLACED = "out of memory", "GPU error", "process replaced"
NODE_LOST = "node lost"
"""The cause where a run's machine left the cluster."""
PREEMPTED = "preempted"
"""The cause where a cluster took a run's machine away, and the run saved first."""
_CAUSES = {EXIT_MEMORY: _MEMORY, EXIT_GPU: _GPU, EXIT_RANK_LOST: "another rank lost", EXIT_REPLACE: _REPLACED}
_CRASHES = (
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGTRAP,
)
"""Signals by which the system, MLX or a driver ends a process. Those that a person sends to stop a run are not among
them."""
_LAST_LINES, _LAST_BYTES = 10, 20_000
"""How much of run.log is shown where a run is given up."""


def find_death(exit_code: int) -> str | None:
    """Return what ended a process after which its run is started again; None where it ended for another reason.

    Args:
        exit_code: as `subprocess` gives it, where a signal is negative.
    """
    if exit_code < 0:
        return signal.Signals(-exit_code).name if -exit_code in _CRASHES else None
    return _CAUSES.get(exit_code)


def ends_process(exit_code: int) -> bool:
    """Return whether the process of a run that ended with the code is of no more use: its memory or its GPU failed, a
    signal stopped it, or it asks for that."""
    return exit_code > 128 or exit_code in _CAUSES


@dataclass(frozen=True)
class Deaths:
    """The deaths of a run's process so far, as the decision on the next start needs them."""

    in_a_row: int = 0
    """Deaths since the last one that found a new checkpoint."""
    checkpoint: int | None = None
    """Step of the newest checkpoint at the last death."""
    cause: str = ""
    """What ended the process last."""

    def add(self, cause: str, checkpoint: int | None) -> Deaths:
        """Return the deaths with one more, which found `checkpoint` as the newest."""
        advanced = checkpoint is not None and (self.checkpoint is None or checkpoint > self.checkpoint)
        return Deaths((0 if cause == _REPLACED else 1) if advanced else self.in_a_row + 1, checkpoint, cause)

    @property
    def are_too_many(self) -> bool:
        """Whether the run does not get on, so that it is not started again."""
        return self.in_a_row >= MAX_DEATHS

    @property
    def may_be_memory(self) -> bool:
        """Whether memory ended the process, or may have: the system kills a process that uses too much, and a failed
        allocation of MLX is a crash on some devices, so that a second death at the same place counts too."""
        return self.cause == _MEMORY or (self.in_a_row >= MAX_DEATHS - 1 and self.cause not in (NODE_LOST, PREEMPTED))

    def text(self, step: int) -> str:
        """Return what ended the process after `step`, and from where the run is started again."""
        begin = "from the beginning" if self.checkpoint is None else f"from step {self.checkpoint}"
        if self.are_too_many:
            return f"{self.cause} after step {step}: {MAX_DEATHS} times in a row without a new checkpoint"
        if self.cause == _REPLACED:
            return f"{_REPLACED} by a new one at step {step}"
        return f"{self.cause} after step {step}: starting again {begin}"


class FollowerPolicy:
    """Decides the same for a rank that is not the first: rank 0's supervisor records and counts the deaths of the run,
    so this one starts again until rank 0 is not to be found any more."""

    changes: Mapping[str, bool] = MappingProxyType({})

    def __init__(self) -> None:
        self._deaths = 0

    def next_start(self, exit_code: int, run: Path | None) -> str | None:
        """Return a line where the rank is started again; `run` is None where it had not joined rank 0.

        Raises:
            GaveUp: rank 0 was not to be found three times in a row.
        """
        cause = find_death(exit_code)
        if cause is None:
            return None
        self._deaths = self._deaths + 1 if run is None else 0
        if self._deaths >= MAX_DEATHS:
            raise GaveUp(f"{cause}: this rank could not join the run {MAX_DEATHS} times in a row.")
        return f"{cause}: this rank is started again"


class RestartPolicy:
    """Decides after each end of a supervised run's process whether and how the run is started again."""

    def __init__(self) -> None:
        self._deaths = Deaths()
        self.changes: dict[str, bool] = {}
        """Settings to start the run again with, by dotted name."""

    def next_start(self, exit_code: int, run: Path | None) -> str | None:
        """Record the end of the process in the directory `run`, and return a line about it if the run is started again.

        Args:
            exit_code: as `subprocess` gives it, where a signal is negative.
            run: None where the process had not claimed a directory.

        Returns:
            None where the process did not die, so that it is not started again.

        Raises:
            GaveUp: the process died too often without a new checkpoint.
        """
        if exit_code == EXIT_CONFIG and self.changes.get(CHECKPOINTING):
            self.changes[CHECKPOINTING] = False
            return f"{CHECKPOINTING}=true is not possible with this model: starting again without it"
        cause = find_death(exit_code)
        return None if cause is None else self.next_start_after(cause, run)

    def next_start_after(self, cause: str, run: Path | None) -> str:
        """Record that `cause` ended the process in the directory `run`, and return a line about the next start.

        Raises:
            GaveUp: the process died too often without a new checkpoint.
        """
        directory = stored_run(run)
        self._deaths = deaths = self._deaths.add(cause, newest_checkpoint(directory) if directory else None)
        if directory is None:
            line = f"{cause} before the run had stored anything"
            if deaths.are_too_many:
                raise GaveUp(f"{line}: {MAX_DEATHS} times in a row.")
            return f"{line}: starting again"
        status = directory.read_status()
        reached = [row["step"] for row in read_rows(directory.metrics)]
        step = max([*reached, status["step"] if is_count(status.get("step")) else 0])
        line = deaths.text(step)
        if deaths.are_too_many:
            _record(directory, status | {"state": "interrupted", "reason": line}, deaths, step, line)
            raise GaveUp(f"{line}.\n{_last_log_lines(directory)}\nTo resume: {resume_command(directory.path)}")
        if deaths.may_be_memory and CHECKPOINTING not in self.changes and not _uses_checkpointing(directory):
            self.changes[CHECKPOINTING] = True
            line += f", with {CHECKPOINTING}=true: less memory, more slowly, to the same result"
        _record(directory, status, deaths, step, line)
        return line


def stored_run(run: Path | None) -> RunDirectory | None:
    """Return the directory of a run that can be resumed; None before its config is stored."""
    with suppress(ConfigError):
        if run is not None:
            section = RunDirectory(run).read_config().get("checkpoint")
            name = section.get("dir") if isinstance(section, Mapping) else None
            return RunDirectory(run, name) if isinstance(name, str) and name else RunDirectory(run)
    return None


def newest_checkpoint(directory: RunDirectory) -> int | None:
    """Return the step of the newest checkpoint by its name, unverified."""
    steps: list[int] = []
    with suppress(OSError):
        matches = (STEP_NAME.fullmatch(path.name) for path in directory.checkpoints.iterdir())
        steps = [int(match[1]) for match in matches if match]
    return max(steps, default=None)


def read_restarts(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the deaths that status.json lists, in order, each with time, cause, step and checkpoint."""
    entries = status.get("restarts")
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def restart_summary(status: Mapping[str, Any]) -> str | None:
    """Return how often a run was started again and why: ``5 (3 SIGKILL, 2 out of memory)``; None if it never was."""
    causes = Counter(shorten(entry.get("cause", "unknown"), 40) for entry in read_restarts(status))
    total = sum(causes.values())
    return f"{total} ({', '.join(f'{count} {cause}' for cause, count in causes.most_common())})" if total else None


def _uses_checkpointing(directory: RunDirectory) -> bool:
    section = directory.read_config().get("train")
    return isinstance(section, Mapping) and section.get("grad_checkpoint") is True


def _record(directory: RunDirectory, status: dict[str, Any], deaths: Deaths, step: int, line: str) -> None:
    """Add a death to status.json and its line to run.log; no process of the run is there to do it."""
    entry = {"time": utc_now(), "cause": deaths.cause, "step": step, "checkpoint": deaths.checkpoint}
    with suppress(RunnerError, OSError):  # another process may have taken the directory, and the disk may be full
        directory.lock()
        try:
            directory.write_status({**status, "restarts": [*read_restarts(status), entry]})
            with open_text(directory.log) as log:
                log.write(f"{utc_now()} {line}\n")
        finally:
            directory.unlock()


def _last_log_lines(directory: RunDirectory) -> str:
    lines: list[str] = []
    with suppress(OSError), directory.log.open("rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - _LAST_BYTES))
        lines = log.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join([f"The end of {relative_path(directory.log)}:", *(f"  {single_line(line)}" for line in lines)])
