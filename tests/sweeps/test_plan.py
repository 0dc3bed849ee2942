"""Which jobs a resumed sweep runs follows from the states of their runs alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.runs import sweep_manifest
from runner.sweeps.plan import PlannedJob, job_labels, plan_jobs


def job_in_state(sweep: Path, number: int, state: str) -> None:
    folder = sweep / str(number)
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "status.json").write_text(json.dumps({"state": state}))


def test_finished_and_diverged_jobs_are_left_alone_and_all_others_run_in_the_order_of_their_numbers(tmp_path):
    manifest = sweep_manifest.read_manifest(tmp_path)
    grid = [(f"seed={seed}",) for seed in range(7)]
    manifest.add(["seed=range(7)"], grid)
    for number, state in enumerate(["finished", "diverged", "failed", "stopped", "running"]):
        job_in_state(tmp_path, number, state)
    (tmp_path / "5").mkdir()  # claimed, but killed before it wrote its config
    jobs = plan_jobs(manifest, grid)
    assert [(job.number, job.resumes) for job in jobs] == [(2, True), (3, True), (4, True), (5, False), (6, False)]


def test_jobs_keep_their_recorded_overrides_unless_they_are_typed_again(tmp_path):
    manifest = sweep_manifest.read_manifest(tmp_path)
    manifest.add([], [("seed=1", "lora.rank=2"), ("seed=2", "lora.rank=2")])
    first, second = plan_jobs(manifest, [("lora.rank=2", "seed=1")])
    assert first.overrides == ("lora.rank=2", "seed=1") and second.overrides == ("seed=2", "lora.rank=2")


@pytest.mark.parametrize("resumes", [False, True])
def test_a_launcher_gets_the_job_that_was_planned(resumes):
    job = PlannedJob(3, ("model=tiny", "data.path='a=b'"), resumes)
    assert PlannedJob.parse(job.launch_overrides()) == job


def test_a_label_holds_what_differs_between_jobs():
    jobs = [PlannedJob(n, ("model=tiny", f"seed={n}"), False) for n in range(2)]
    assert job_labels(jobs) == ["seed=0", "seed=1"]
    assert job_labels(jobs[:1]) == ["model=tiny seed=0"]
