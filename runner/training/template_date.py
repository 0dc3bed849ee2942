"""The date that a chat template writes as today's: that of a run's first start, also when the run is resumed later.

It is stored in config.yaml as data.template_date, where the template writes a date at all.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import date, datetime

from runner.common.clock import today
from runner.config.serialize import change_dict
from runner.runs.directory import RunDirectory
from runner.runs.run_spec import RunSpec


def fill_date(spec: RunSpec) -> RunSpec:
    """Return `spec` with data.template_date: the one of its config, else the day on which the run was first started."""
    day = spec.config.data.template_date or _first_day(spec).isoformat()
    return replace(spec, config=replace(spec.config, data=replace(spec.config.data, template_date=day)))


def record_date(spec: RunSpec) -> None:
    """Store the date in config.yaml, so that a resume, and a branch of the run, finds it there."""
    day = spec.config.data.template_date
    if spec.stored["data"].get("template_date") != day:
        spec.directory.write_config(change_dict(spec.stored, {"data.template_date": day}))


def _first_day(spec: RunSpec) -> date:
    """Return the day, local time, on which the run that is resumed was started; of a new run today."""
    if spec.source is not None:
        # Runs of earlier versions have no date in config.yaml, but their template wrote this one.
        started = RunDirectory(spec.source.run).read_status().get("started")
        try:
            return datetime.fromisoformat(str(started)).astimezone().date()
        except ValueError:
            pass
    return today()
