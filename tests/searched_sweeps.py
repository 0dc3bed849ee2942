"""The directory of a search, written by hand: for reports of rungs, which need no training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluated_runs import row_losses, write_run

from runner.config import serialize
from runner.config.schema import Config
from runner.runs.search_record import SearchRecord, SearchRecordWriter
from runner.runs.sweep_manifest import SweepJob, SweepManifest

RUNGS = (10, 30, 90)
SPACE = ["lora.rank=4,8,16", "optimizer.learning_rate=tag(log,interval(1e-5,1e-2))"]
LOSSES = (1.30, 1.10, 1.25, 1.40, 1.05, 1.50, 1.20, None, None)
"""Of each trial at the first rung; trial 7 diverged, trial 8 failed. 1 and 4 continue to the second, 4 to the end."""


@dataclass
class Searched:
    """A search that is written step by step, as the sweeper does."""

    folder: Path
    manifest: SweepManifest
    writer: SearchRecordWriter
    metric: Any = "valid_loss"

    def add_job(self, **settings: Any) -> int:
        """Record a job with these settings, dots as two underscores, and return its number."""
        changes = {name.replace("__", "."): value for name, value in settings.items()}
        changes |= {"model.path": "builtin:tiny", "data.path": "builtin:tiny", "objective.metric": self.metric}
        number = len(self.manifest.jobs)
        overrides = tuple(f"{name.replace('__', '.')}={value}" for name, value in settings.items())
        config = serialize.change_dict(serialize.to_dict(Config()), changes)
        self.manifest.record(jobs=[SweepJob(number, str(number), overrides, config)])
        return number

    def train(
        self, job: int, losses: Mapping[int, float], state: str, *, seconds_per_update: float = 1.0, **status: Any
    ) -> None:
        """Write the run of a job as it is after evaluations with these losses, by step."""
        config = serialize.flatten(serialize.from_dict(self.manifest.jobs[job].config or {}, "sweep.jsonl"))
        names = ("lora.rank", "optimizer.learning_rate", "seed", "objective.metric")
        settings = {name.replace(".", "__"): config[name] for name in names}
        evaluations = {0: row_losses(2.0)} | {step: row_losses(loss, seed=job) for step, loss in losses.items()}
        folder = self.folder / str(job)
        if folder.exists():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        status = {"iters": RUNGS[-1], **status}
        write_run(folder, evaluations, state=state, seconds_per_update=seconds_per_update, status=status, **settings)

    def stop_at(self, stops: Mapping[int, int | None]) -> None:
        """Record how far jobs train for now."""
        self.manifest.record(stops=stops)


def write_search(
    folder: Path,
    *,
    metric: Any = "valid_loss",
    seeds: Sequence[int] = (),
    finished: bool = True,
    trials: int = len(LOSSES),
) -> Searched:
    """Write a search by successive halving of nine trials over three rungs.

    Args:
        folder: the directory of the sweep.
        metric: its objective.
        seeds: further seeds of its best trial.
        finished: whether it has come to its end; else it was killed before anything was decided at the first rung.
        trials: how many of the trials there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    searched = Searched(folder, SweepManifest(folder), SearchRecordWriter(folder, SearchRecord()), metric)
    append = searched.writer.append
    append(
        {
            "schema": 1,
            "sampler": "tpe",
            "pruner": "halving",
            "eta": 3,
            "seed": 0,
            "rungs": list(RUNGS),
            "metrics": [metric] if isinstance(metric, str) else metric,
            "judged_by": "valid_loss",
            "options": {"sampler": "tpe", "trials": trials, "budget": "8h", "seeds": 1 + len(seeds)},
            "space": SPACE,
        }
    )
    append({"planned": {"trials": trials}, "wave": 0, "reason": f"the budget holds {trials} trials at 1.2 s an update"})
    append({"wave": 0, "asked": trials})
    with closing(searched.writer):
        for number, loss in enumerate(LOSSES[:trials]):
            params = {"lora.rank": (4, 8, 16)[number % 3], "optimizer.learning_rate": round(1e-4 * (number + 1), 6)}
            job = searched.add_job(**{name.replace(".", "__"): value for name, value in params.items()})
            append({"trial": number, "job": job, "params": params})
            searched.stop_at({job: RUNGS[0]})
            if loss is not None:
                searched.train(job, {5: loss + 0.2, 10: loss}, "stopped", reason="stop_at")
                append({"result": number, "step": 10, "values": [loss], "state": "paused"})
        if trials == len(LOSSES):
            searched.train(7, {5: 1.9}, "diverged", reason="the loss is not finite at step 7")
            append({"result": 7, "step": 7, "values": [], "state": "diverged", "reason": "the loss is not finite"})
            searched.train(8, {5: 1.0}, "failed", reason="OutOfMemory: 3 GB")
            append({"result": 8, "step": 5, "values": [], "state": "failed", "reason": "OutOfMemory: 3 GB"})
        append({"spent": 130.0, "jobs": 120.0, "updates": 100, "beside": 5.0, "starts": 9})
        if finished:
            _finish(searched, seeds)
    return searched


def _finish(searched: Searched, seeds: Sequence[int]) -> None:
    append = searched.writer.append
    append({"wave": 1, "asked": 0, "continued": [{"trials": [4, 1], "from": 10, "to": 30, "of": 8, "cut": 1.10}]})
    searched.stop_at({4: 30, 1: 30})
    for number, loss in ((4, 0.95), (1, 0.90)):
        searched.train(number, {5: 1.3, 10: LOSSES[number] or 0.0, 30: loss}, "stopped", reason="stop_at")
        append({"result": number, "step": 30, "values": [loss], "state": "paused"})
    append({"wave": 2, "asked": 0, "continued": [{"trials": [1], "from": 30, "to": 90, "of": 2, "cut": 0.90}]})
    searched.stop_at({1: None})
    searched.train(1, {5: 1.3, 10: 1.10, 30: 0.90, 90: 0.80}, "finished")
    append({"result": 1, "step": 90, "values": [0.80], "state": "finished"})
    if seeds:
        append({"wave": 3, "asked": 0, "replicates": [{"trial": 1, "seed": seed} for seed in seeds]})
    for seed in seeds:
        job = searched.add_job(lora__rank=8, optimizer__learning_rate=2e-4, seed=seed)
        append({"replicate": 1, "job": job, "seed": seed})
        searched.train(job, {10: 1.2, 30: 1.0, 90: 0.80 + seed / 1000}, "finished")
    values = {number: loss for number, loss in enumerate(LOSSES) if loss is not None}
    ranked = sorted(values, key=lambda number: values[number])
    for place, number in enumerate(ranked, 1):
        if number not in (1, 4):
            append({"stopped": number, "step": 10, "place": place, "of": 8, "value": values[number]})
    append({"stopped": 4, "step": 30, "place": 2, "of": 2, "value": 0.95})
    append({"spent": 400.0, "jobs": 380.0, "updates": 300, "beside": 9.0, "starts": 13})


def record_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of search.jsonl."""
    return [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
