"""What was launched is what runs: each job runs the config that was recorded before the first one started."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import system
import yaml

from runner.common.errors import ConfigError
from runner.config.invocation import Invocation
from runner.data.source import find_dataset
from runner.runs.directory import RunDirectory
from runner.runs.sweep_manifest import read_manifest
from runner.sweeps.launchers.request import job_request

SMALL = ("model=tiny", "data=tiny", "train.iters=6", "train.eval_every=3", "checkpoint.every=2", "train.report_every=1")
RARE = ("train.eval_every=200", "checkpoint.every=100", "train.report_every=20")
"""For runs that only have to last: the time of an update is mostly that of its evaluations and checkpoints."""
RECIPE = "# @package _global_\ntrain: {iters: 6}\nlora: {rank: %d}\n"


def stored(job: Path) -> dict:
    return yaml.safe_load((job / "config.yaml").read_text())


def job_settings(sweep: Path, *names: str) -> list[tuple]:
    """The values of settings, by section and name, in the configs of all jobs, in the order of their numbers."""
    configs = [stored(sweep / job.folder) for job in read_manifest(sweep).jobs]
    found = []
    for config in configs:
        values = []
        for name in names:
            section, _, key = name.rpartition(".")
            values.append((config[section] if section else config)[key])
        found.append(tuple(values))
    return found


def test_a_refused_resume_removes_nothing_and_a_second_one_is_refused_too(inline):
    process = inline.start("-m", *SMALL, "train.iters=100000", "lora.rank=2,4", "hydra.sweep.dir=s")
    inline.wait_for(inline.folder / "s/0", 10, process)
    process.send_signal(signal.SIGSTOP)  # it holds the sweep all the same, and leaves the processor to the others
    for _ in range(2):
        assert f"pid {process.pid}" in inline("resume=s", expect=3)
        assert (inline.folder / "s/.lock").exists()
    process.kill()
    process.communicate()


@pytest.mark.parametrize("tries", [1, pytest.param(6, marks=pytest.mark.long)])
def test_of_two_starts_in_one_directory_one_wins_and_the_other_is_refused(cli, tries):
    arguments = ("-m", *SMALL, "train.iters=1", "lora.rank=2,4")
    for number in range(tries):
        processes = [cli.start(*arguments, f"hydra.sweep.dir=s{number}") for _ in range(2)]
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        codes = sorted(process.returncode for process in processes)
        assert codes[0] == 0 and codes[1] in (2, 3), outputs
        assert {row["state"] for row in cli.results(cli.folder / f"s{number}").values()} == {"finished"}


@pytest.mark.parametrize("launcher", ["serial", pytest.param("process", marks=pytest.mark.long)])
def test_a_sweep_resumed_in_another_working_directory_trains_the_same_data(
    inline, make_cli, launcher, tmp_path_factory
):
    shutil.copytree(find_dataset("builtin:tiny"), inline.folder / "my")
    elsewhere = make_cli(tmp_path_factory.mktemp("elsewhere"), in_process=True)
    shutil.copytree(find_dataset("builtin:tiny"), elsewhere.folder / "my")
    text = '{"prompt": "other", "completion": "data"}\n'
    for split in ("train", "valid"):
        (elsewhere.folder / "my" / f"{split}.jsonl").write_text(text * 8)
    arguments = ("-m", *SMALL, "data.path=my", "seed=1,2", f"hydra/launcher={launcher}", "hydra.sweep.dir=s")
    inline(*arguments)
    sweep = inline.folder / "s"
    values = [row["objective"] for _, row in sorted(inline.results(sweep).items())]
    shutil.rmtree(sweep / "1")
    elsewhere(f"resume={sweep}")
    assert [row["objective"] for _, row in sorted(inline.results(sweep).items())] == values
    assert {stored(sweep / job)["data"]["path"] for job in ("0", "1")} == {str(inline.folder / "my")}


@pytest.mark.parametrize("launcher", ["serial", pytest.param("process", marks=pytest.mark.long)])
def test_a_recipe_that_changes_or_goes_does_not_change_the_jobs_still_to_start(inline, launcher):
    recipe = inline.folder / "mine/experiment/rec.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(RECIPE % 2)
    arguments = ("--config-dir", "mine", *SMALL, "experiment=rec", "seed=1,2,3", f"hydra/launcher={launcher}")
    inline("-m", *arguments, "hydra.sweep.dir=s")
    for number, change in enumerate(
        (lambda: recipe.write_text(RECIPE % 4), lambda: shutil.rmtree(inline.folder / "mine"))
    ):
        change()
        shutil.rmtree(inline.folder / f"s/{number + 1}")
        inline("resume=s")
        assert job_settings(inline.folder / "s", "lora.rank", "seed") == [(2, 1), (2, 2), (2, 3)]


def test_a_recipe_edited_while_the_sweep_runs_changes_nothing(cli):
    recipe = cli.folder / "mine/experiment/rec.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(RECIPE % 2)
    arguments = ("--config-dir", "mine", *SMALL, *RARE, "experiment=rec", "train.iters=200", "seed=1,2")
    process = cli.start("-m", *arguments, "hydra.sweep.dir=s")
    cli.wait_for(cli.folder / "s/0", 10, process)
    recipe.write_text(RECIPE % 4)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert job_settings(cli.folder / "s", "lora.rank", "seed") == [(2, 1), (2, 2)]


def test_jobs_save_and_end_with_the_process_launcher_that_was_killed(inline, assert_equal_runs):
    long = (*SMALL, *RARE, "train.iters=100000")
    arguments = (*long, "seed=1,2,3", "hydra/launcher=process", "hydra.launcher.jobs=2")
    process = inline.start("-m", *arguments, "hydra.sweep.dir=s")
    inline.wait_for(inline.folder / "s/0", 20, process)
    inline.wait_for(inline.folder / "s/1", 20, process)
    before = [json.loads((inline.folder / f"s/{job}/status.json").read_text()) for job in (0, 1)]
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(system.is_running(status["pid"]) for status in before):
        assert time.monotonic() < deadline, "a job outlived its parent"
        time.sleep(0.05)
    after = [json.loads((inline.folder / f"s/{job}/status.json").read_text()) for job in (0, 1)]
    assert [status["state"] for status in after] == ["stopped", "stopped"]
    iters = f"train.iters={max(status['step'] for status in after) + 5}"
    assert "1 to start, 2 to resume" in inline("resume=s", iters)
    inline(*long, iters, "seed=2", "hydra.run.dir=alone")
    assert_equal_runs(inline.folder / "alone", inline.folder / "s/1")


def test_a_worker_that_is_stopping_on_a_signal_saves_though_its_parent_ends(inline):
    inline("-m", *SMALL, "train.iters=100000", "seed=1", "train.stop_at=1", "hydra.sweep.dir=s")
    pipes = {"stdin": subprocess.PIPE, "stderr": None}
    worker = inline.start(words=("-m", "runner.sweeps.launchers.worker"), **pipes)
    assert worker.stdin is not None and worker.stdout is not None
    sweep = inline.folder / "s"
    request = job_request(
        read_manifest(sweep).jobs[0],
        sweep / "0",
        label="",
        log=inline.folder / "log",
        invocation=Invocation(),
        record={},
        changes={},
    )
    print(json.dumps(request), file=worker.stdin, flush=True)
    status = sweep / "0/status.json"
    deadline = time.monotonic() + 60
    while json.loads(status.read_text())["step"] < 10:
        assert time.monotonic() < deadline and worker.poll() is None
        time.sleep(0.01)
    worker.send_signal(signal.SIGINT)
    worker.stdin.close()
    assert json.loads(worker.stdout.readline())["code"] in (130, 143)  # whichever it noticed first
    assert worker.wait(timeout=60) == 0
    found = json.loads(status.read_text())
    assert found["state"] == "stopped" and found["last_checkpoint"] == found["step"]


def test_a_worker_that_is_killed_fails_its_own_job_only(cli):
    arguments = (*SMALL, *RARE, "train.iters=200", "seed=1,2", "hydra/launcher=process", "hydra.launcher.jobs=1")
    process = cli.start("-m", *arguments, "hydra.sweep.dir=s")
    os.kill(cli.wait_for(cli.folder / "s/0", 20, process), signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    rows = cli.results(cli.folder / "s")
    assert process.returncode == 1 and "killed by SIGKILL" in out
    assert [rows[number]["state"] for number in range(2)] == ["failed", "finished"]


def test_values_typed_on_resume_are_added_to_the_grid(inline):
    inline("-m", *SMALL, "lora.rank=2,4", "seed=0,1", "hydra.sweep.dir=s")
    assert "4 jobs, 4 done" in inline("resume=s", "seed=0,1")
    assert "6 jobs, 2 to start, 4 done" in inline("resume=s", "lora.rank=8")
    assert "9 jobs, 3 to start, 6 done" in inline("resume=s", "seed=2")
    pairs = {(rank, seed) for rank in (2, 4, 8) for seed in (0, 1, 2)}
    assert set(job_settings(inline.folder / "s", "lora.rank", "seed")) == pairs


def test_a_group_typed_on_resume_takes_all_other_settings_from_the_record(inline):
    inline("-m", *SMALL, "optimizer.learning_rate=1e-3,2e-3", "hydra.sweep.dir=s")
    inline("resume=s", "optimizer=sgd")
    names = ("optimizer.name", "optimizer.learning_rate", "optimizer.weight_decay")
    assert job_settings(inline.folder / "s", *names) == [
        ("adamw", 1e-3, 0.01),
        ("adamw", 2e-3, 0.01),
        ("sgd", 1e-3, 0.0),
        ("sgd", 2e-3, 0.0),
    ]


def test_a_free_setting_typed_on_resume_applies_to_all_jobs(inline):
    inline("-m", *SMALL, "seed=1,2", "hydra.sweep.dir=s")
    out = inline("resume=s", "checkpoint.keep_last=1", "train.iters=8")
    assert "changed for all jobs: train.iters=8" in out and "2 jobs, 2 to resume" in out
    assert "changed on resume: train.iters 6 -> 8" in (inline.folder / "s/0/run.log").read_text()
    assert job_settings(inline.folder / "s", "checkpoint.keep_last", "train.iters") == [(1, 8)] * 2
    assert "2 jobs, 2 done" in inline("resume=s")
    inline("resume=s", "seed=3")  # later jobs have it from the start
    assert job_settings(inline.folder / "s", "checkpoint.keep_last", "train.iters", "seed")[2] == (1, 8, 3)


def test_what_was_changed_for_one_job_stays_until_it_is_changed_for_all_jobs_again(inline):
    inline("-m", *SMALL, "seed=1,2", "train.stop_at=2", "hydra.sweep.dir=s")
    inline("resume=s", "checkpoint.keep_last=1", "train.stop_at=4")
    inline("resume=s/1", "checkpoint.keep_last=5", "train.stop_at=5")
    assert "2 to resume" in inline("resume=s")
    assert job_settings(inline.folder / "s", "checkpoint.keep_last") == [(1,), (5,)]
    assert "2 jobs, 2 done" in inline("resume=s")
    inline("resume=s", "seed=3")  # a new job does not inherit it
    assert job_settings(inline.folder / "s", "checkpoint.keep_last") == [(1,), (5,), (1,)]
    shutil.rmtree(inline.folder / "s/1")
    inline("resume=s")
    assert job_settings(inline.folder / "s", "checkpoint.keep_last") == [(1,), (5,), (1,)]
    out = inline("resume=s", "checkpoint.keep_last=1")
    assert "changed for all jobs: checkpoint.keep_last=1" in out and "1 to resume, 2 done" in out
    assert job_settings(inline.folder / "s", "checkpoint.keep_last") == [(1,), (1,), (1,)]


def test_what_the_run_of_one_job_refuses_is_not_recorded_and_nothing_is_while_the_sweep_runs(inline):
    inline("-m", *SMALL, "seed=1,2", "hydra.sweep.dir=s")
    before = (inline.folder / "s/sweep.jsonl").read_bytes()
    for typed in ("seed=3", "train.iters=4"):
        inline("resume=s/1", "checkpoint.keep_last=5", typed, expect=2)
    directory = RunDirectory(inline.folder / "s")
    directory.lock()
    assert "one of its jobs can be changed after that" in inline("resume=s/1", "checkpoint.keep_last=5", expect=3)
    inline("resume=s/1")
    directory.unlock()
    assert (inline.folder / "s/sweep.jsonl").read_bytes() == before


def test_a_recipe_named_on_resume_comes_from_the_config_folder_of_the_sweep(inline):
    folder = inline.folder / "mine/experiment"
    folder.mkdir(parents=True)
    for name, rank in (("a", 2), ("b", 3)):
        (folder / f"{name}.yaml").write_text(f"# @package _global_\nlora: {{rank: {rank}}}\n")
    inline("--config-dir", "mine", "-m", *SMALL, "experiment=a", "seed=1,2", "hydra.sweep.dir=s")
    sweep = inline.folder / "s"
    inline.folder = inline.folder / "elsewhere"
    inline.folder.mkdir()
    assert "4 jobs, 2 to start, 2 done" in inline(f"resume={sweep}", "experiment=b")
    assert job_settings(sweep, "lora.rank") == [(2,), (2,), (3,), (3,)]
    shutil.rmtree(folder.parent)
    assert "4 jobs, 4 done" in inline(f"resume={sweep}")
    out = inline(f"resume={sweep}", "experiment=c", expect=2)
    assert "experiment=c is not a choice" in out and f"{folder.parent}, does not exist any more" in out


def test_what_cannot_be_added_is_refused_and_not_recorded(inline):
    inline("-m", *SMALL, "seed=1,2", "hydra.sweep.dir=s")
    before = (inline.folder / "s/sweep.jsonl").read_bytes()
    for typed, message in (
        ("checkpoint.keep_last=1,2", "may change on resume, so it applies to all jobs"),
        ("train.iters=4", "is before update 6"),
        ("lora.rank=0", "lora.rank=0 is invalid"),
        ("data.path=/nope", "There is no file or folder '/nope'"),
        ("vars.x=1", "vars.x: no setting of all jobs is recorded to follow it"),
    ):
        assert message in inline("resume=s", typed, expect=2)
        assert (inline.folder / "s/sweep.jsonl").read_bytes() == before
    assert "the sweep has no such job; it has 0 to 1" in inline("resume=s/9", expect=2)


def test_a_new_location_of_the_data_leaves_finished_jobs_alone_and_jobs_added_later_have_it(inline):
    inline("-m", *SMALL, "seed=1", "hydra.sweep.dir=s")
    shutil.copytree(find_dataset("builtin:tiny"), inline.folder / "my")
    row = (inline.folder / "my/train.jsonl").read_text().splitlines()[0]
    (inline.folder / "my/train.jsonl").write_text(f"{row}\n" * 8)  # other rows, so that job 0 could not resume
    assert "1 job, 1 done" in inline("resume=s", "data.path=my")
    (inline.folder / "elsewhere").mkdir()
    inline.folder = inline.folder / "elsewhere"
    out = inline("resume=../s", "seed=2")
    assert "job 1  seed=2" in out and "elsewhere/.." not in out
    rows = inline.results(inline.folder.parent / "s")
    assert [rows[number]["data.path"] for number in (0, 1)] == ["builtin:tiny", str(inline.folder.parent / "my")]


def test_a_typed_callback_is_not_inherited_and_the_refusal_names_the_manifest(inline):
    callback = "+hydra.callbacks.c._target_=hydra.experimental.callback.Callback"
    inline("-m", *SMALL, "seed=1", callback, "hydra.sweep.dir=s")
    out = inline("resume=s", expect=2)
    assert f"hydra.callbacks.c comes from {inline.folder / 's/sweep.jsonl'}" in out and "type the setting again" in out
    assert "1 job, 1 done" in inline("resume=s", callback)


def test_a_damaged_manifest_is_explained_in_words(tmp_path):
    head = '{"schema": 2, "lines": 2, "arguments": [], "launcher": {}}\n'
    for line, reason in (
        ("no JSON", "it is not JSON"),
        ("[1]", "a value has the wrong type"),
        ('{"job": 0, "folder": "0"}', "id is missing"),
    ):
        (tmp_path / "sweep.jsonl").write_text(f"{head}{line}\n")
        with pytest.raises(ConfigError, match=f"sweep.jsonl, line 2 cannot be understood: {reason}"):
            read_manifest(tmp_path)


def test_train_iters_of_a_schedule_that_ends_there_is_refused_for_all_jobs(inline):
    inline("-m", *SMALL, "schedule=cosine", "seed=1,2", "hydra.sweep.dir=s")
    assert "the cosine schedule ends at train.iters" in inline("resume=s", "train.iters=8", expect=2)


def test_stop_at_holds_for_one_invocation(inline):
    inline("-m", *SMALL, "seed=1,2", "train.stop_at=3", "hydra.sweep.dir=s")
    assert {row["step"] for row in inline.results(inline.folder / "s").values()} == {"3"}
    inline("resume=s")
    assert {row["step"] for row in inline.results(inline.folder / "s").values()} == {"6"}


def test_a_job_can_be_changed_by_itself_after_it_failed(inline):
    inline("-m", *SMALL, "lora.keys=[self_attn.q_proj],[nonsense]", "hydra.sweep.dir=s", expect=1)
    inline("repeat=s/1", "lora.keys=[self_attn.k_proj]", "hydra.run.dir=other")
    assert "1 of 2 jobs failed" in inline("resume=s", expect=1)
