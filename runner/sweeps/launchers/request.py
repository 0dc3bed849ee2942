"""What a launcher asks a worker process to do: one job, as plain JSON values, so that a worker reads no manifest.

A search records how far a job trains for now while its workers run: what they had read at their start would be old.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.app import guard
from runner.config.invocation import Invocation, Supervision
from runner.config.labels import Labels
from runner.runs.sweep_manifest import SweepJob


def job_request(
    job: SweepJob,
    folder: Path,
    *,
    label: str,
    log: Path,
    invocation: Invocation,
    record: Mapping[str, str],
    changes: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the request to train `job` in `folder`; the arguments are those of `runner.sweeps.job.train_job`.

    Args:
        log: file that its output is appended to.
    """
    trust = {name: value for name, value in invocation.settings.items() if name == guard.TRUST}
    return {
        "job": asdict(job),
        "folder": str(folder),
        "label": label,
        "log": str(log),
        "record": dict(record),
        "changes": dict(changes),
        "stop_at": invocation.stop_at,
        "settings": trust,
        "ranks": invocation.ranks,
        "supervise": invocation.supervise and asdict(invocation.supervise),
    }


def requested_job(request: Mapping[str, Any]) -> SweepJob:
    """Return the job of a request."""
    fields = dict(request["job"])
    return SweepJob(**{**fields, "overrides": tuple(fields["overrides"]), "labels": Labels.of(fields["labels"])})


def requested_invocation(request: Mapping[str, Any]) -> Invocation:
    """Return what a request has of the command line."""
    supervise = None if request["supervise"] is None else Supervision(**request["supervise"])
    settings, ranks = request["settings"], request.get("ranks")  # an earlier version's has none
    return Invocation(stop_at=request["stop_at"], settings=settings, supervise=supervise, ranks=ranks)
