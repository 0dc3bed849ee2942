"""Sweeps as a user runs them: finished, extended, with every launcher, after signals and kills."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SMALL = ("experiment=smoke", "train.iters=6", "train.eval_every=3", "checkpoint.every=2", "lora.dropout=0.1")


def alone(cli, name: str, *arguments: str) -> Path:
    """The same training as a single run."""
    cli(*arguments, f"hydra.run.dir={name}")
    return cli.folder / name


def test_a_sweep_prints_a_table_ranked_by_the_objective_and_writes_results_and_curves(inline):
    out = inline("-m", *SMALL, "lora.rank=2,4", "optimizer.learning_rate=1e-4,1e-2", "hydra.sweep.dir=s")
    rows = inline.results(inline.folder / "s")
    assert [r["state"] for r in rows.values()] == ["finished"] * 4
    values = [float(r["objective"]) for r in rows.values()]
    assert values == sorted(values) and next(iter(rows)) in (1, 3)
    assert [line.split()[0] for line in out.splitlines() if "finished" in line][-4:] == [str(n) for n in rows]
    svg = (inline.folder / "s/curves.svg").read_text()
    assert svg.count("<polyline") == 4 and "rank=2" in svg
    assert (inline.folder / "s/multirun.yaml").exists()


def test_resume_of_a_finished_sweep_runs_nothing_and_of_an_extended_one_only_the_new_jobs(inline):
    inline("-m", *SMALL, "lora.rank=2,4", "hydra.sweep.dir=s")
    before = {p: p.stat().st_mtime_ns for p in (inline.folder / "s").rglob("adapters.safetensors")}
    out = inline("resume=s")
    assert "2 done" in out and "to start" not in out
    out = inline("resume=s", "lora.rank=2,3,4")
    assert "1 to start, 2 done" in out
    rows = inline.results(inline.folder / "s")
    assert {n: r["lora.rank"] for n, r in sorted(rows.items())} == {0: "2", 1: "4", 2: "3"}
    assert (
        before.items() <= {p: p.stat().st_mtime_ns for p in (inline.folder / "s").rglob("adapters.safetensors")}.items()
    )


def test_an_invalid_value_in_any_job_is_refused_before_the_first_starts_and_leaves_no_folder(inline):
    out = inline("-m", *SMALL, "lora.rank=2,0", "hydra.sweep.dir=s", expect=2)
    assert "lora.rank=0" in out
    assert not (inline.folder / "s").exists()


@pytest.mark.parametrize(
    "launcher", ["serial", *(pytest.param(name, marks=pytest.mark.long) for name in ("process", "joblib"))]
)
def test_stop_at_stops_every_job_and_resume_finishes_each_equal_to_a_single_run(
    cli, inline, assert_equal_runs, launcher
):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    run = cli if launcher == "joblib" else inline
    run("-m", *SMALL, "lora.rank=2,4", "train.stop_at=3", f"hydra/launcher={launcher}", "hydra.sweep.dir=s")
    assert "stop_at" not in (run.folder / "s/sweep.jsonl").read_text() + (run.folder / "s/0/config.yaml").read_text()
    assert {r["state"] for r in run.results(run.folder / "s").values()} == {"stopped"}
    out = run("resume=s")
    assert "2 to resume" in out
    for number, rank in enumerate((2, 4)):
        assert_equal_runs(run.folder / f"s/{number}", alone(inline, f"alone{rank}", *SMALL, f"lora.rank={rank}"))


@pytest.mark.slow
@pytest.mark.parametrize("own_processes", [False, pytest.param(True, marks=pytest.mark.long)])
def test_jobs_that_share_a_process_equal_single_runs_in_any_order(cli, inline, assert_equal_runs, own_processes):
    """Gradient checkpointing, dropout, a quantized base and several ranks, each after every other kind."""
    common = {"train": {"iters": 4}, "lora": {"dropout": 0.1}, "data": {"metric": "exact_match"}}
    variants = {
        "rank4": {"lora": {"rank": 4}},
        "checkpointed": {"lora": {"rank": 8}, "train": {"grad_checkpoint": True}},
        "quantized": {"model": {"quantize": {"bits": 4, "group_size": 32}}},
        "narrow": {"lora": {"rank": 2, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}},
        "accumulated": {"lora": {"rank": 8}, "train": {"grad_accumulation": 2}},
    }
    (cli.folder / "mine/experiment").mkdir(parents=True)
    for name, own in variants.items():
        settings = {section: {**common.get(section, {}), **own.get(section, {})} for section in {*common, *own}}
        settings["defaults"] = [{"override /model": "tiny"}, {"override /data": "tiny"}]
        text = "# @package _global_\n" + yaml.safe_dump(settings)
        (cli.folder / f"mine/experiment/{name}.yaml").write_text(text)
    overrides = ("--config-dir", str(cli.folder / "mine"), "data.metric_rows=2", "data.max_new_tokens=2")
    for name in variants:
        alone(cli if own_processes else inline, f"alone_{name}", *overrides, f"experiment={name}")
    for round_, order in enumerate((list(variants), list(variants)[::-1])):
        inline("-m", *overrides, f"experiment={','.join(order)}", f"hydra.sweep.dir=s{round_}")
        for number, name in enumerate(order):
            assert_equal_runs(cli.folder / f"s{round_}/{number}", cli.folder / f"alone_{name}")


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["joblib", "process"])
def test_every_launcher_gives_identical_runs(cli, inline, launcher, assert_equal_runs):
    overrides = (*SMALL, "lora.rank=2,4")
    inline("-m", *overrides, "hydra.sweep.dir=serial")
    cli("-m", *overrides, f"hydra/launcher={launcher}", "hydra.sweep.dir=other")
    for number in (0, 1):
        assert_equal_runs(cli.folder / f"serial/{number}", cli.folder / f"other/{number}")
    out = cli("resume=other", "lora.rank=2,3,4")
    assert "1 to start, 2 done" in out
    assert cli.results(cli.folder / "other")[2]["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["serial", "process"])
def test_a_signal_to_a_sweep_saves_the_job_in_progress_and_ends_the_sweep(cli, launcher):
    overrides = (*SMALL, "train.iters=100000", "lora.rank=2,4,6,8")
    process = cli.start("-m", *overrides, f"hydra/launcher={launcher}", "hydra.sweep.dir=s")
    cli.wait_for(cli.folder / "s/0", 10, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert cli.results(cli.folder / "s")[0]["state"] == "stopped"
    assert "resume=s" in out


@pytest.mark.parametrize("launcher", ["serial", pytest.param("process", marks=pytest.mark.long)])
def test_a_job_killed_before_it_wrote_its_config_starts_again_whatever_its_checkpoint_folder(
    inline, launcher, assert_equal_runs
):
    arguments = (*SMALL, "checkpoint.dir=saved", "lora.rank=2,4")
    inline("-m", *arguments, f"hydra/launcher={launcher}", "hydra.sweep.dir=s")
    job = inline.folder / "s/1"
    finished = job.rename(inline.folder / "finished")
    (job / "saved").mkdir(parents=True)  # the claim
    shutil.copytree(finished / ".hydra", job / ".hydra")
    shutil.copy(finished / ".lock", job)
    (job / "run.log").write_text("")
    out = inline("resume=s")
    assert "1 to start, 1 done" in out
    for run in (job, finished):
        (run / "saved").rename(run / "checkpoints")
    assert_equal_runs(job, finished)


@pytest.mark.parametrize("launcher", ["serial", pytest.param("process", marks=pytest.mark.long)])
def test_a_resumed_job_keeps_its_stored_config_where_the_files_that_it_was_composed_from_changed(inline, launcher):
    (inline.folder / "mine/experiment").mkdir(parents=True)
    text = (
        "# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /data: tiny\n"
        "train: {iters: 6}\nlora: {dropout: %s}\n"
    )
    (inline.folder / "mine/experiment/mine.yaml").write_text(text % 0.1)
    arguments = ("--config-dir=mine", "experiment=mine", "seed=1,2", f"hydra/launcher={launcher}")
    inline("-m", *arguments, "train.stop_at=3", "hydra.sweep.dir=s")
    before = (inline.folder / "s/0/config.yaml").read_text()
    (inline.folder / "mine/experiment/mine.yaml").write_text(text % 0.2)
    inline("resume=s")
    assert [row["state"] for row in inline.results(inline.folder / "s").values()] == ["finished"] * 2
    assert (inline.folder / "s/0/config.yaml").read_text() == before


def test_a_job_never_starts_in_a_link_that_leads_out_of_the_sweep(inline):
    inline("-m", *SMALL, "lora.rank=2,4", "hydra.sweep.dir=s")
    shutil.rmtree(inline.folder / "s/1")
    (inline.folder / "elsewhere").mkdir()
    (inline.folder / "s/1").symlink_to(inline.folder / "elsewhere")
    assert "s/1 is a symbolic link" in inline("resume=s", expect=2)
    assert list((inline.folder / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("launcher", ["serial", pytest.param("process", marks=pytest.mark.long)])
def test_repeat_of_a_run_as_a_sweep_can_be_resumed(inline, launcher):
    alone(inline, "run", *SMALL, "lora.rank=2")
    inline("-m", "repeat=run", "lora.rank=3,4", "train.stop_at=2", f"hydra/launcher={launcher}", "hydra.sweep.dir=s")
    inline("resume=s")
    rows = inline.results(inline.folder / "s")
    assert {r["state"] for r in rows.values()} == {"finished"}
    assert json.loads((inline.folder / "s/0/status.json").read_text())["iters"] == 6


def test_a_sweep_started_by_an_earlier_version_resumes(inline):
    """There, resume=, repeat= and train.stop_at= were settings, recorded in manifests and configs."""
    alone(inline, "run", *SMALL, "lora.rank=2")
    inline("-m", "repeat=run", "lora.rank=3,4", "train.stop_at=2", "hydra.sweep.dir=s")
    manifest = inline.folder / "s/sweep.jsonl"
    launch, *jobs = map(json.loads, manifest.read_text().splitlines())
    for job in jobs:
        job["overrides"] = ["repeat=run", *job["overrides"], "train.stop_at=2"]
        job["id"] = f"old{job['job']}"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in (launch, *jobs)))
    stored = inline.folder / "s/0/config.yaml"
    config = yaml.safe_load(stored.read_text()) | {"resume": None, "repeat": "run"}
    config["train"]["stop_at"] = 2
    stored.write_text(yaml.safe_dump(config))
    assert "2 to resume" in inline("resume=s")
    assert {r["state"] for r in inline.results(inline.folder / "s").values()} == {"finished"}
    assert "1 to start, 2 done" in inline("resume=s", "lora.rank=3,4,5")


def test_jobs_that_an_earlier_version_was_killed_before_recording_are_planned_from_its_arguments(inline):
    alone(inline, "run", *SMALL, "lora.dropout=0.2", "train.stop_at=1")
    inline("-m", "repeat=run", "lora.rank=3,4", "seed=1,2", "train.stop_at=2", "hydra.sweep.dir=s")
    manifest = inline.folder / "s/sweep.jsonl"
    head, *jobs = map(json.loads, manifest.read_text().splitlines())
    old = {"schema": 1, "words": head["arguments"]}
    lines = [old]
    for job in jobs[:2]:
        lines.append(
            {"job": job["job"], "id": "old", "overrides": [*job["overrides"], "stored=run", "train.stop_at=2"]}
        )
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"job": 2, "id"')
    for number in (1, 2, 3):
        shutil.rmtree(inline.folder / f"s/{number}")
    out = inline("resume=s")
    assert "before it had recorded all jobs: 2 more are planned" in out and "3 to start, 1 to resume" in out
    rows = inline.results(inline.folder / "s")
    pairs = [(rows[number]["lora.rank"], rows[number]["seed"]) for number in range(4)]
    assert pairs == [("3", "1"), ("3", "2"), ("4", "1"), ("4", "2")]
    config = yaml.safe_load((inline.folder / "s/3/config.yaml").read_text())
    assert config["lora"]["dropout"] == 0.2  # that of the repeated run
    assert "4 jobs, 4 done" in inline("resume=s")


def test_repeat_of_a_sweep_means_its_best_job(inline):
    arguments = ("schedule=cosine", "schedule.warmup=3", "optimizer.learning_rate=1e-5,1e-2")
    inline("-m", *SMALL, *arguments, "hydra.sweep.dir=s")
    best = next(iter(inline.results(inline.folder / "s")))
    inline("repeat=s", "train.iters=4", "hydra.run.dir=again")
    stored = [yaml.safe_load((inline.folder / f"{run}/config.yaml").read_text()) for run in (f"s/{best}", "again")]
    rates = [config["optimizer"]["learning_rate"] for config in stored]
    assert rates[0] == rates[1] == 1e-2 and stored[1]["train"]["iters"] == 4
    out = inline("repeat=s", "train.iters=2", expect=2)
    assert "schedule.warmup=3 leaves no update" in out and "type schedule.warmup=1 or less" in out


def test_resume_of_a_sweep_excludes_repeat(inline):
    inline("-m", *SMALL, "lora.rank=2,4", "train.stop_at=1", "hydra.sweep.dir=s")
    assert "leave out repeat=" in inline("resume=s", "repeat=s/0", expect=2)


def test_a_sweep_in_an_experiment_file_runs_without_the_multirun_flag(inline):
    (inline.folder / "mine/experiment").mkdir(parents=True)
    (inline.folder / "mine/experiment/ranks.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /data: tiny\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      lora.rank: 2,4\n      seed: [1, 2]\n"
        "train:\n  iters: 2\n"
    )
    out = inline("--config-dir", "mine", "experiment=ranks", "hydra.sweep.dir=s")
    assert "4 jobs" in out
    out = inline("resume=s", "lora.rank=2,4,6")
    assert "2 to start, 4 done" in out


def test_group_choices_and_globs_are_swept(inline):
    inline(
        "-m",
        "model=tiny",
        "data=tiny",
        "train.iters=1",
        "schedule=glob(c*,exclude=*restarts)",
        "optimizer=sgd,adam",
        "hydra.sweep.dir=s",
    )
    rows = inline.results(inline.folder / "s")
    assert {(r["schedule"], r["optimizer"]) for r in rows.values()} == {
        (s, o) for s in ("constant", "cosine") for o in ("sgd", "adam")
    }


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory without files, which only /proc tells")
@pytest.mark.long
@pytest.mark.slow
def test_memory_does_not_grow_over_thirty_jobs(cli):
    code = (
        "import sys, resource; from runner.__main__ import main; import mlx.core as mx\n"
        "sizes = []\n"
        "from runner.training import run as module\n"
        "own = module.train_run\n"
        "def watched(*a, **k):\n"
        "    out = own(*a, **k); sizes.append(mx.get_active_memory() + mx.get_cache_memory())\n"
        "    lines = dict(line.split(':') for line in open('/proc/self/status'))\n"
        # Pages of files do not count: the system takes them from a process and gives them back as it likes.
        "    sizes_rss.append(sum(int(lines[n].split()[0]) << 10 for n in ('RssAnon', 'VmSwap')))\n"
        "    return out\n"
        "sizes_rss = []\n"
        "module.train_run = watched\n"
        "rc = main(['-m', 'model=tiny', 'data=tiny', 'train.iters=2', 'seed=range(30)', 'hydra.sweep.dir=s'])\n"
        "print('SIZES', sizes[4], sizes[-1], min(sizes_rss[7:12]), min(sizes_rss[-5:])); sys.exit(rc)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cli.folder, env=cli.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    mlx_early, mlx_late, rss_early, rss_late = map(int, done.stdout.split("SIZES")[1].split()[:4])
    assert mlx_late <= mlx_early
    assert rss_late - rss_early < 18 * 500_000  # under half a megabyte a job
