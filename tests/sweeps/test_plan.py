"""Which jobs a resumed sweep runs follows from the states of their runs alone, and from what was changed since."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from runner.reports.job_settings import job_labels, varied_settings
from runner.runs.sweep_manifest import SweepJob, SweepManifest
from runner.sweeps.plan import PlannedJob, remaining_jobs


def manifest_of(folder: Path, count: int) -> SweepManifest:
    jobs = [SweepJob(number, str(number), (f"seed={number}",), {"seed": number}) for number in range(count)]
    return SweepManifest(folder, jobs=jobs)


def job_in_state(sweep: Path, number: int, state: str) -> None:
    folder = sweep / str(number)
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\ncheckpoint: {keep_last: 3}\n")
    (folder / "status.json").write_text(json.dumps({"state": state}))


def test_finished_and_diverged_jobs_are_left_alone_and_all_others_run_in_the_order_of_their_numbers(tmp_path):
    manifest = manifest_of(tmp_path, 7)
    for number, state in enumerate(["finished", "diverged", "failed", "stopped", "running"]):
        job_in_state(tmp_path, number, state)
    (tmp_path / "5").mkdir()  # claimed, but killed before it wrote its config
    jobs = remaining_jobs(manifest)
    assert [(planned.job.number, planned.resumes) for planned in jobs] == [
        (2, True),
        (3, True),
        (4, True),
        (5, False),
        (6, False),
    ]


def test_a_finished_job_runs_again_where_a_setting_was_changed_for_all_jobs_and_it_does_not_have_it_yet(tmp_path):
    manifest = manifest_of(tmp_path, 2)
    job_in_state(tmp_path, 0, "finished")
    job_in_state(tmp_path, 1, "diverged")
    for keep_last, left in ((3, []), (1, [0])):
        manifest.jobs = [job.with_changes({"checkpoint.keep_last": keep_last}) for job in manifest.jobs]
        assert [planned.job.number for planned in remaining_jobs(manifest)] == left


def test_a_finished_job_does_not_run_again_for_another_location_of_its_data(tmp_path):
    manifest = manifest_of(tmp_path, 1)
    job_in_state(tmp_path, 0, "finished")
    manifest.jobs = [job.with_changes({"data.path": "/elsewhere", "model.revision": "x"}) for job in manifest.jobs]
    assert remaining_jobs(manifest) == []


def test_a_launcher_gets_the_folder_of_the_job_and_no_record_is_written_again(tmp_path):
    job = SweepJob(3, "r 3", ("model=tiny",))
    begun, new = PlannedJob(job, True), PlannedJob(job, False)
    sweep = tmp_path / "a, b"
    assert new.launch_overrides(sweep, ".hydra")[1:] == [
        f"hydra.sweep.dir='{sweep}'",
        "hydra.sweep.subdir='r 3'",
        "hydra.output_subdir=.hydra",
    ]
    assert begun.launch_overrides(sweep, ".hydra")[-1] == "hydra.output_subdir=null"


def test_a_label_holds_what_differs_between_jobs():
    jobs = [SweepJob(n, str(n), ("model=tiny", f"seed={n}"), {"seed": n}) for n in range(2)]
    assert job_labels(jobs) == {0: "seed=0", 1: "seed=1"}
    assert job_labels(jobs[:1]) == {0: ""}


def test_the_settings_that_vary_have_the_values_of_each_jobs_config_whatever_was_typed():
    def config(path: str, rank: int, rate: float) -> dict:
        lora = {"rank": rank, "alpha": 8.0}
        return {"data": {"path": path}, "lora": lora, "optimizer": {"learning_rate": rate}, "vars": {"x": rank}}

    jobs = [
        SweepJob(0, "0", ("data.path='builtin\\:tiny'",), config("builtin:tiny", 8, 1e-4), {"optimizer": "adamw"}),
        SweepJob(1, "1", ("data.path=/a b", "++vars.x=4"), config("/a b", 4, 1e-4), {"optimizer": "adamw"}),
        SweepJob(2, "2", ("lora={rank: 4}", "optimizer=sgd"), config("/a b", 4, 1e-3), {"optimizer": "sgd"}),
        SweepJob(3, "3", ("seed=1",)),  # of an earlier version
    ]
    assert list(varied_settings(jobs[:3]).values()) == [
        {"data.path": "builtin:tiny", "vars.x": 8, "lora.rank": 8, "optimizer": "adamw"},
        {"data.path": "/a b", "vars.x": 4, "lora.rank": 4, "optimizer": "adamw"},
        {"data.path": "/a b", "vars.x": 4, "lora.rank": 4, "optimizer": "sgd"},
    ]
    # Hydra chose a file of the group, too, below the dicts.
    dicts = [
        replace(job, overrides=(f"lora={{rank: {4 + 4 * i}}}",), choices={"lora": "default"})
        for i, job in enumerate(jobs[:2])
    ]
    assert [settings["lora.rank"] for settings in varied_settings(dicts).values()] == [8, 4]
    assert varied_settings(jobs)[3]["seed"] == "1"
    escaped = SweepJob(4, "4", (r"seed=$\{oc.env\:SEED\}",))
    assert varied_settings([*jobs, escaped])[4]["seed"] == "${oc.env:SEED}"
    changed = [jobs[0], jobs[1].with_changes({"data.path": "builtin:tiny"})]
    assert "data.path" not in varied_settings(changed)[0]
