"""The time that a search has spent, all its processes together, and what it was spent on."""

from __future__ import annotations

import time
from collections.abc import Sequence

from runner.common.clock import parse_utc, utc_now
from runner.runs.search_record import SearchRecord, SearchRecordWriter
from runner.sweeps.search.outcome import Progress
from runner.sweeps.search.state import Clock


class TimeAccount:
    """Counts the time from its creation on, beside what is recorded, and records it after each launch."""

    def __init__(self, record: SearchRecord, writer: SearchRecordWriter, budget_seconds: float | None) -> None:
        self._record, self._writer, self._budget_seconds = record, writer, budget_seconds
        self._spent_before, self._started = record.spent_seconds, time.monotonic()
        self._has_launched = False
        """Whether this process has launched jobs: the first launch loads what the others share."""

    @property
    def spent(self) -> float:
        """Seconds that the search has taken."""
        return self._spent_before + time.monotonic() - self._started

    def clock(self) -> Clock:
        """Return the time that is left, and how long jobs take as measured so far."""
        record = self._record
        left = None if self._budget_seconds is None else self._budget_seconds - self.spent
        if not record.updates:
            return Clock(left)
        per_start = record.beside_seconds / record.starts if record.starts else 0.0
        return Clock(left, record.job_seconds / record.updates, per_start)

    def add_killed_wave(self, last_written: float, progress: Progress) -> None:
        """Record what the last process did since its last record, where it was killed in a wave.

        Args:
            last_written: when a job last wrote its metrics, in seconds since 1970.
            progress: of all jobs together.
        """
        record = self._record
        if not record.waves:
            return
        times = (parse_utc(line.get("time")) for line in reversed(record.lines) if "wave" in line or "spent" in line)
        recorded = next((found for found in times if found is not None), last_written)
        lost = max(0.0, last_written - recorded)
        made = progress - Progress(record.updates, record.job_seconds)
        last = record.lines[-1]
        is_in_a_wave = not any(name in last for name in ("spent", "result", "stopped", "planned", "missed"))
        if made.updates or is_in_a_wave:
            self._spent_before += lost
            self._write(made)

    def add_launch(self, seconds: float, jobs: Sequence[Progress], at_once: int) -> None:
        """Record a launch that took `seconds`: what its jobs made in it, `at_once` of them side by side."""
        made = Progress(sum(job.updates for job in jobs), sum(job.seconds for job in jobs))
        beside = max(0.0, seconds * min(len(jobs), at_once) - made.seconds)
        is_first, self._has_launched = not self._has_launched, True
        self._write(made) if is_first else self._write(made, beside, len(jobs))

    def _write(self, made: Progress, beside: float = 0.0, starts: int = 0) -> None:
        record = self._record
        self._writer.append(
            {
                "spent": round(self.spent, 3),
                "jobs": round(record.job_seconds + made.seconds, 3),
                "updates": record.updates + made.updates,
                "beside": round(record.beside_seconds + beside, 3),
                "starts": record.starts + starts,
                "time": utc_now(),
            }
        )
