"""Searches as a user runs them, on the tiny model: exact, resumed, extended, with every sampler and launcher."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import optuna
import pytest

from runner.runs.search_record import read_search
from runner.runs.sweep_manifest import read_manifest
from runner.sweeps.search.search import Search
from runner.training.trainer import Trainer

SMALL = ("model=tiny", "data=tiny", "train.iters=9", "train.eval_every=5", "checkpoint.every=50", "lora.dropout=0.1")
SPACE = ("optimizer.learning_rate=tag(log,interval(1e-4,1e-1))", "lora.rank=interval(2,8)")
SEARCH = ("-m", "hydra/sweeper=search", "hydra.sweeper.trials=9", *SMALL, *SPACE)
TIMES = ("spent", "time")


def record(sweep: Path) -> list[dict[str, Any]]:
    """The lines of search.jsonl without those that hold times."""
    lines = [json.loads(line) for line in (sweep / "search.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines if "spent" not in line]


def jobs(sweep: Path) -> list[tuple[str, tuple[str, ...], int | None]]:
    return [(job.id, job.overrides, job.stop_at) for job in read_manifest(sweep).jobs]


def states(sweep: Path) -> list[str]:
    return [json.loads((sweep / str(n) / "status.json").read_text())["state"] for n in range(len(jobs(sweep)))]


@pytest.fixture(scope="module")
def _searched(make_cli, tmp_path_factory) -> Path:
    program = make_cli(tmp_path_factory.mktemp("search"), in_process=True)
    program(*SEARCH, "hydra.sweep.dir=s")
    return program.folder / "s"


@pytest.fixture
def sweep(inline, _searched) -> Path:
    """A search of nine trials that has ended, in the folder s."""
    shutil.copytree(_searched, inline.folder / "s")
    return inline.folder / "s"


def test_a_survivor_equals_the_run_that_never_stopped(inline, sweep, assert_equal_runs):
    found = read_search(sweep)
    assert found is not None and found.rungs == [1, 3, 9] and len(found.trials) == 9
    assert sorted(len(trial.results) for trial in found.trials) == [1] * 6 + [2, 2, 3]
    winner = next(trial for trial in found.trials if len(trial.results) == 3)
    params = [f"{name}={value}" for name, value in winner.params.items()]
    inline(*SMALL, *params, "train.eval_at=[1,3,9]", "hydra.run.dir=alone")
    # The run alone keeps the checkpoint of the end; that of the search kept those of its rungs, too.
    assert_equal_runs(inline.folder / "alone", sweep / str(winner.job))
    ends = {trial.number: trial.stopped for trial in found.trials if trial is not winner}
    assert all(end is not None and end["of"] == (9 if end["step"] == 1 else 3) for end in ends.values())


def test_a_finished_search_has_nothing_left_and_more_trials_extend_it(inline, sweep):
    before = record(sweep)
    files = {path: path.stat().st_mtime_ns for path in sweep.rglob("adapters.safetensors")}
    inline("resume=s")
    assert record(sweep) == before
    assert files == {path: path.stat().st_mtime_ns for path in sweep.rglob("adapters.safetensors")}
    inline("resume=s", "hydra.sweeper.trials=12", "hydra.sweeper.seeds=2", "hydra.sweeper.finalists=2")
    after = record(sweep)
    assert after[: len(before)] == before
    assert after[len(before)] == {"extended": {"trials": 12, "seeds": 2, "finalists": 2}, "wave": 11}
    found = read_search(sweep)
    assert found is not None and len(found.trials) == 12
    finished = [trial for trial in found.trials if trial.results[-1].state == "finished"]
    assert len(finished) >= 2 and sum(len(trial.replicates) for trial in finished) == 2
    for trial in finished:
        for seed, job in trial.replicates.items():
            config = read_manifest(sweep).jobs[job].config
            assert config is not None and config["seed"] == seed == 1


def test_the_report_of_a_search_says_what_its_record_has(inline, sweep):
    found = read_search(sweep)
    assert found is not None
    winner = next(trial for trial in found.trials if len(trial.results) == 3)
    shown = json.loads(inline("show", "s", "--json"))
    assert shown["runs"][0]["run"] == str(winner.job) and inline("best", "s") == f"s/{winner.job}\n"
    assert [rung["reached"] for rung in shown["search"]["rungs"]] == [9, 3, 1] and shown["search"]["complete"]
    assert [rung["continued"] for rung in shown["search"]["rungs"]] == [3, 1, 0]
    ranked = [run["rung"] for run in shown["runs"]]
    assert ranked == [None, 3, 3, *[1] * 6]  # trained to its end first, then by the rung that was reached
    for trial, recorded in zip(shown["search"]["trials"], found.trials, strict=True):
        if recorded is not winner:
            stop = recorded.stopped
            assert stop is not None
            expected = (
                f"stopped at {stop['step']}: place {stop['place']} of {stop['of']}, valid loss {stop['value']:.4f}; "
            )
            assert trial["reason"].startswith(expected)
    (more,) = [command["words"] for command in shown["commands"] if command["what"] == "search on"]
    assert more == "python -m runner resume=s hydra.sweeper.trials=18"


def kill_at_random(cli, sweep: str, kills: int, *arguments: str) -> int:
    """Start the search and resume it until it ends, killed at random moments; return how often it was killed."""
    generator, killed = random.Random(0), 0
    process = cli.start(*arguments, f"hydra.sweep.dir={sweep}")
    while killed < kills:
        time.sleep(generator.uniform(0.1, 1.4))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        if process.returncode == 0:
            break
        resumes = (cli.folder / sweep / "sweep.jsonl").exists() and read_manifest(cli.folder / sweep).jobs
        process = cli.start(*([f"resume={sweep}"] if resumes else [*arguments, f"hydra.sweep.dir={sweep}"]))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    cli(f"resume={sweep}")
    return killed


@pytest.mark.parametrize(
    "kills, options",
    [
        (4, ("train.averaging_power=3",)),
        pytest.param(20, ("hydra.sweeper.seeds=2",), marks=pytest.mark.long),
        pytest.param(8, ("hydra.sweeper.pruner=asha",), marks=pytest.mark.long),
        pytest.param(8, ("hydra.sweeper.sampler=cmaes", "hydra.sweeper.pruner=none"), marks=pytest.mark.long),
        pytest.param(8, ("hydra.sweeper.sampler=qmc", "hydra/launcher=process"), marks=pytest.mark.long),
    ],
)
def test_a_search_killed_at_random_equals_one_that_was_not(cli, inline, assert_equal_runs, kills, options):
    arguments = (*SEARCH, *options)
    cli(*arguments, "hydra.sweep.dir=whole")
    killed = kill_at_random(cli, "killed", kills, *arguments)
    assert killed >= min(kills, 3)
    whole, again = cli.folder / "whole", cli.folder / "killed"
    assert record(whole) == record(again)
    found = [read_search(sweep) for sweep in (whole, again)]
    assert found[0] is not None and found[1] is not None and found[0].updates == found[1].updates
    assert jobs(whole) == jobs(again) and states(whole) == states(again)
    for number in range(len(jobs(whole))):
        assert_equal_runs(whole / str(number), again / str(number))
    verdicts = [inline("show", name).partition("verdict")[2].partition("\nsweep")[0] for name in ("whole", "killed")]
    by_time = r"\d+\.\d+s|, cheapest|cheapest of these.*\n|whole|killed| {2,}"
    verdicts = [re.sub(by_time, "", text) for text in verdicts]
    assert verdicts[0] == verdicts[1] != ""


def test_an_evaluation_that_a_signal_stopped_at_a_rung_is_made_up_for(inline, sweep, monkeypatch):
    own, at_rung = Trainer.evaluate, []

    def evaluate(trainer):
        if trainer.state.progress.step == 1 and not at_rung:
            at_rung.append(trainer)
            os.kill(os.getpid(), signal.SIGTERM)
        return own(trainer)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    inline(*SEARCH, "hydra.sweep.dir=stopped", expect=128 + signal.SIGTERM)
    status = json.loads((inline.folder / "stopped/0/status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 1, "SIGTERM")
    inline("resume=stopped")
    assert record(inline.folder / "stopped") == record(sweep)


@pytest.mark.parametrize("sampler", [pytest.param("random", marks=pytest.mark.long), "qmc", "cmaes"])
def test_every_sampler_suggests_within_the_space_by_its_seed(inline, sampler):
    pruner = "none" if sampler == "cmaes" else "halving"
    options = (f"hydra.sweeper.sampler={sampler}", f"hydra.sweeper.pruner={pruner}", "hydra.sweeper.trials=3")
    short = ("hydra.sweeper.eta=2", "train.iters=2")
    params = []
    for name, seed in (("a", 0), ("b", 1)):
        inline(*SEARCH, *options, *short, f"hydra.sweeper.seed={seed}", f"hydra.sweep.dir={name}")
        found = read_search(inline.folder / name)
        assert found is not None
        params.append([trial.params for trial in found.trials])
    inline("resume=a")  # which suggests the same again, or is refused
    assert params[0] != params[1]
    assert all(1e-4 <= p["optimizer.learning_rate"] <= 1e-1 and 2 <= p["lora.rank"] <= 8 for p in params[0])
    assert len({str(p) for p in params[0]}) == 3


def test_where_the_trials_are_enough_for_all_combinations_each_is_tried_once(inline):
    inline(*SEARCH, "optimizer.learning_rate=1e-3,1e-2", "lora.rank=2,4", "train.iters=3", "hydra.sweep.dir=s")
    found = read_search(inline.folder / "s")
    assert found is not None and found.settings["sampler"] == "grid"
    assert [tuple(trial.params.values()) for trial in found.trials] == [(1e-3, 2), (1e-3, 4), (1e-2, 2), (1e-2, 4)]


def test_a_grid_without_a_number_of_trials_has_the_rungs_for_all_its_combinations(inline, monkeypatch):
    monkeypatch.setattr(Search, "run", lambda search: None)  # the plan alone
    options = ("hydra.sweeper.sampler=grid", "hydra.sweeper.trials=null", "train.iters=81")
    grid = ("optimizer.learning_rate=1e-3,1e-2", "lora.rank=range(1,9)", "seed=range(0,6)")
    out = inline(*SEARCH, *options, *grid, "hydra.sweep.dir=s")
    assert "96 trials by grid" in out and "rungs 1, 3, 9, 27, 81, of which" in out


def test_groups_and_lists_are_searched_as_well(inline):
    inline(
        *SEARCH[:-2],
        "optimizer=adamw,sgd",
        "lora.keys=choice([self_attn.q_proj],[self_attn.q_proj,self_attn.v_proj])",
        "train.iters=3",
        "hydra.sweep.dir=s",
    )
    configs = [job.config or {} for job in read_manifest(inline.folder / "s").jobs]
    assert {config["optimizer"]["name"] for config in configs} == {"adamw", "sgd"}
    assert {len(config["lora"]["keys"]) for config in configs} == {1, 2}
    # The options of the chosen group alone, whatever the others have.
    assert {(config["optimizer"]["name"], config["optimizer"].get("momentum")) for config in configs} == {
        ("adamw", None),
        ("sgd", 0.0),
    }


def test_a_searched_group_has_what_a_recipe_and_the_command_line_set_on_top_as_in_a_grid(inline):
    recipe = inline.folder / "mine/experiment"
    recipe.mkdir(parents=True)
    (recipe / "own.yaml").write_text("# @package _global_\noptimizer: {learning_rate: 0.007, weight_decay: 0.1}\n")
    size = inline.folder / "mine/size"
    size.mkdir()
    for name, rank in (("small", 2), ("large", 4)):
        (size / f"{name}.yaml").write_text(f"# @package _global_\nlora: {{rank: {rank}, alpha: {2 * rank}}}\n")
    words = (
        "--config-dir",
        "mine",
        *SMALL,
        "experiment=own",
        "optimizer=adamw,lion",
        "size=small,large",
        "lora.alpha=9",
    )
    short = ("train.iters=1", "hydra.sweeper.pruner=none")
    inline("-m", *words, "train.iters=1", "hydra.sweep.dir=grid")
    inline("-m", *words, "hydra/sweeper=search", *short, "hydra.sweep.dir=s")
    inline("resume=s")
    configs = [[job.config for job in read_manifest(inline.folder / name).jobs] for name in ("grid", "s")]
    assert configs[0] == configs[1]
    assert {config["optimizer"]["learning_rate"] for config in configs[1] if config} == {0.007}


def test_several_metrics_are_told_together_and_their_front_comes_first(inline):
    inline(
        *SEARCH,
        "objective.metric=[valid_loss,tokens_per_second]",
        "hydra.sweeper.pruner=none",
        "hydra.sweeper.trials=3",
        "train.iters=2",
        "hydra.sweep.dir=s",
    )
    found = read_search(inline.folder / "s")
    assert found is not None and found.settings["maximize"] == [False, True]
    assert all(len(trial.results[-1].values) == 2 for trial in found.trials)
    runs = json.loads(inline("show", "s", "--json"))["runs"]
    points = [(run["objective"], -run["others"]["tokens_per_second"]) for run in runs]
    for run, point in zip(runs, points, strict=True):
        surpassed = any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
        assert run["on_pareto_front"] is not surpassed
    front = [run["on_pareto_front"] for run in runs]
    assert front == sorted(front, reverse=True) and runs[0]["objective"] == min(point[0] for point in points)


def test_a_trial_that_diverges_is_worse_than_any_other_and_the_search_goes_on(inline):
    out = inline(
        *SEARCH, "optimizer=sgd", "optimizer.learning_rate=1e-2,1e30", "lora.rank=2,4", "hydra.sweep.dir=s", expect=1
    )
    found = read_search(inline.folder / "s")
    assert found is not None
    ended = {trial.results[-1].state for trial in found.trials if trial.params["optimizer.learning_rate"] == 1e30}
    assert ended == {"diverged"}
    assert any(trial.results[-1].state == "finished" for trial in found.trials)
    assert "2 of 4 jobs failed or diverged" in out
    first = json.loads(inline("show", "s", "--json"))["search"]["rungs"][0]
    assert first["reached"] == found.continued[0]["of"] == 4  # the table counts as the search did
    study = optuna.load_study(study_name="search", storage=_journal(inline.folder / "s"))
    assert sorted(trial.state.name for trial in study.trials) == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
    assert all(trial.value is None or trial.value < 10 for trial in study.trials)


def test_where_trial_after_trial_fails_the_search_ends_and_tries_the_last_ones_again(inline):
    data = inline.folder / "data"
    shutil.copytree(Path(__file__).parents[3] / "runner/data/sets/tiny", data)
    (data / "train.jsonl").write_text("no row\n")
    arguments = (*SEARCH, f"data.path={data}")
    out = inline(*arguments, "hydra.sweep.dir=s", expect=1)
    assert "3 trials in a row failed" in out and len(jobs(inline.folder / "s")) == 3
    shutil.copy(Path(__file__).parents[3] / "runner/data/sets/tiny/train.jsonl", data)
    inline("resume=s", expect=1)  # the first two failed before it was known that all do
    found = read_search(inline.folder / "s")
    assert found is not None
    assert [trial.results[-1].state for trial in found.trials[:3]].count("failed") == 2
    assert any(trial.results[-1].state == "finished" for trial in found.trials)


def test_the_time_of_a_wave_that_was_killed_counts(inline, sweep):
    lines = (sweep / "search.jsonl").read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if '"wave"' in line)
    wave = {**json.loads(lines[last]), "time": "2020-01-01T00:00:00Z"}
    (sweep / "search.jsonl").write_text("\n".join([*lines[:last], json.dumps(wave)]) + "\n")
    inline("resume=s")
    spent = [json.loads(line)["spent"] for line in (sweep / "search.jsonl").read_text().splitlines() if "spent" in line]
    assert spent == sorted(spent) and spent[-1] - spent[-2] > 24 * 3600 * 365


def test_a_single_trial_has_a_rung_at_which_others_can_be_compared_with_it(inline):
    inline(*SEARCH, "hydra.sweeper.trials=1", "train.iters=2", "hydra.sweep.dir=s")
    found = read_search(inline.folder / "s")
    assert found is not None and found.rungs == [1, 2]
    assert [result.step for result in found.trials[0].results] == [1, 2]


def test_a_used_budget_starts_nothing_and_more_of_it_continues(inline, sweep):
    out = inline("resume=s", "hydra.sweeper.trials=11", "hydra.sweeper.budget=0.1s")
    assert "the budget is used, after 9 trials" in out and "leaves out: 2 of 11 trials" in out
    more = re.search(r"search on +python -m runner resume=s hydra.sweeper.budget=(\d+)s\n", out)
    found = read_search(sweep)
    assert found is not None and len(found.trials) == 9 and found.planned[0]["planned"] == {"trials": 9}
    assert more is not None and int(more[1]) > found.spent_seconds
    before = record(sweep)
    inline("resume=s")
    assert record(sweep) == before
    inline("resume=s", "hydra.sweeper.budget=10h")
    extended = read_search(sweep)
    assert extended is not None and len(extended.trials) == 11


def test_a_search_begins_with_the_results_of_an_earlier_sweep(inline):
    inline("-m", *SMALL, "train.iters=2", "optimizer.learning_rate=1e-3,1e-2", "lora.rank=2,4", "hydra.sweep.dir=grid")
    arguments = (
        *SEARCH,
        "hydra.sweeper.warm_from=grid",
        "hydra.sweeper.trials=2",
        "train.iters=3",
        "hydra.sweep.dir=s",
    )
    out = inline(*arguments)
    assert "4 results of grid" in out
    found = read_search(inline.folder / "s")
    assert found is not None and len(found.settings["earlier"]) == 4
    study = optuna.load_study(study_name="search", storage=_journal(inline.folder / "s"))
    assert len(study.trials) == 6
    shutil.rmtree(inline.folder / "grid")
    inline("resume=s")  # needs them no more


EARLIER = ("model=tiny", "data=tiny", "train.iters=1", "train.eval_every=1")
BEGIN = ("-m", "hydra/sweeper=search", "hydra.sweeper.trials=2", "hydra.sweeper.pruner=none", *EARLIER)


@pytest.mark.parametrize(
    "typed, searched, used",
    [
        (("size=small,large",), ("size=small,large",), 2),
        pytest.param(("size=small,large",), ("lora.rank=2,4,8",), 2, marks=pytest.mark.long),
        pytest.param(("lora.dropout=0,0.1",), ("lora.dropout=0.0,0.1",), 2, marks=pytest.mark.long),
        pytest.param(("+vars.r=2,4", "lora.rank=${vars.r}"), ("lora.rank=range(2,9)",), 2, marks=pytest.mark.long),
        (("lora.rank=2,4,5",), ("+vars.q=interval(2,4)", "lora.rank=${vars.q}"), 2),
        pytest.param(
            ("lora={rank: 2, alpha: 8},{rank: 4, alpha: 8}",),
            ("lora={alpha: 8, rank: 2},{rank: 4, alpha: 8.0}",),
            2,
            marks=pytest.mark.long,
        ),
        pytest.param(
            ("data.system_prompt='be brief',null",), ('data.system_prompt="be brief",null',), 2, marks=pytest.mark.long
        ),
        pytest.param(("lora.rank=3,4,6",), ("lora.rank=range(2,9,2)",), 2, marks=pytest.mark.long),
    ],
    ids=["group", "group by value", "0 as 0.0", "variable", "by variable", "dicts", "quotes", "range"],
)
def test_earlier_jobs_are_recognized_by_what_they_compute(inline, typed, searched, used):
    size = inline.folder / "mine/size"
    size.mkdir(parents=True)
    for name, rank in (("small", 2), ("large", 4)):
        (size / f"{name}.yaml").write_text(f"# @package _global_\nlora: {{rank: {rank}, alpha: 8}}\n")
    inline("-m", "--config-dir", "mine", *EARLIER, *typed, "hydra.sweep.dir=grid")
    words = ("--config-dir", "mine", *BEGIN, *searched, "hydra.sweeper.warm_from=grid", "hydra.sweep.dir=s")
    out = inline(*words)
    assert f"warm start: {used} results: {used} finished" in out
    inline("resume=s")


def test_earlier_jobs_that_were_stopped_or_diverged_are_used_and_those_of_other_data_are_not(inline, sweep):
    words = (*BEGIN, *SPACE, "lora.dropout=0.1", "hydra.sweeper.warm_from=s")
    status = json.loads((sweep / "0/status.json").read_text())
    (sweep / "0/status.json").write_text(json.dumps(status | {"state": "diverged"}))
    out = inline(*words, "hydra.sweep.dir=again")
    assert "warm start: 9 results: 1 finished, 7 stopped before their end, 1 diverged" in out
    assert "they differ from this search in train.iters" in out
    trials = optuna.load_study(study_name="search", storage=_journal(inline.folder / "again")).trials[:9]
    assert sorted(trial.state.name for trial in trials) == ["COMPLETE", *["PRUNED"] * 8]
    out = inline(*words, "data.mask_prompt=false", "hydra.sweep.dir=other", expect=2)
    assert "none of its jobs can be used: 9 jobs with another data.mask_prompt than False (True)" in out
    out = inline(*words, f"adapter={next(sweep.glob('*/adapters'))}", "hydra.sweep.dir=other", expect=2)
    assert "none of its jobs can be used: 9 jobs with another adapter than" in out
    assert not (inline.folder / "other").exists()


@pytest.mark.parametrize(
    "options, reason",
    [
        (("hydra.sweeper.sampler=tpee",), "Did you mean 'tpe'"),
        (("hydra.sweeper.trials=0",), "must be a whole number, 1 or more"),
        (("hydra.sweeper.budget=soon",), "must be a duration"),
        (("lora.rank=2,0",), "lora.rank=0 is invalid"),
        (("train.iters=3,9",), "have one length"),
        (("train.iters=1",), "train.iters=1 leaves no step"),
        (("train.eval_at=[3],[4]",), "have one length"),
        (("train.stop_at=3",), "the rungs decide"),
        (("objective.metric=[valid_loss,tokens_per_second]",), "pruner=none"),
        (("hydra.sweeper.warm_from=nowhere",), "there is no sweep"),
        (("hydra.sweeper.sampler=grid",), "has no end"),
        (("hydra.sweeper.sampler=cmaes",), "pruner=halving stops most of them before: type hydra.sweeper.pruner=none"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_leaves_no_folder(inline, options, reason):
    assert reason in inline(*SEARCH, *options, "hydra.sweep.dir=s", expect=2)
    assert not (inline.folder / "s").exists()


def test_a_resume_changes_free_settings_and_refuses_what_the_suggestions_depend_on(inline, sweep):
    assert "the space of a search is fixed" in inline("resume=s", "lora.rank=16", expect=2)
    assert "hydra.sweeper.eta is 3 in this search" in inline("resume=s", "hydra.sweeper.eta=2", expect=2)
    for change in (
        "train.iters=18",
        "train.eval_every=3",
        "train.eval_at=[2]",
        "objective.metric=tokens_per_second",
        "data.path=other",
    ):
        inline("resume=s", change, expect=2)
    adapter = next(sweep.glob("*/adapters"))
    for change in ("train.on_nonfinite=skip", "train.nonfinite_limit=3", f"adapter={adapter}"):
        assert "have to stay comparable" in inline("resume=s", change, expect=2)
    assert "may raise their number" in inline("resume=s", "hydra.sweeper.trials=3", expect=2)
    out = inline("resume=s", "checkpoint.keep_last=1", "hydra.sweeper.trials=10")
    assert "changed for all jobs: checkpoint.keep_last=1" in out
    stored = [(run / "config.yaml").read_text() for run in sweep.glob("[0-9]")]
    assert len(stored) == 10 and all("keep_last: 1\n" in text for text in stored)
    inline("resume=s")
    assert len(jobs(sweep)) == 10


@pytest.mark.parametrize(
    "change",
    [{"rungs": []}, {"options": None}, {"space": [3]}, {"sampler": "\x1b[31m"}, {"maximize": ["no"]}, None],
)
def test_a_damaged_record_is_refused_in_one_sentence(inline, sweep, change):
    head, *lines = (sweep / "search.jsonl").read_text().splitlines()
    first = [] if change is None else [json.dumps(json.loads(head) | change)]
    (sweep / "search.jsonl").write_text("\n".join([*first, *lines]) + "\n")
    out = inline("resume=s", expect=2)
    assert "first line, which says what is searched, is missing or damaged" in out and "\x1b" not in out
    assert "hydra.sweeper.warm_from=s" in out


def test_a_record_that_is_lost_is_named_and_its_jobs_are_no_grid(inline, sweep):
    (sweep / "search.jsonl").unlink()
    out = inline("resume=s", "lora.rank=3", expect=2)
    assert "s/search.jsonl is missing" in out and "hydra.sweeper.warm_from=s" in out and len(jobs(sweep)) == 9
    assert "search.jsonl is missing" in inline("show", "s")


def test_what_a_search_left_that_recorded_no_job_makes_no_search_of_a_grid(inline, sweep):
    folder = inline.folder / "g"
    folder.mkdir()
    for name in ("search.jsonl", "optuna-journal.log"):
        shutil.copy(sweep / name, folder)
    inline("-m", *SMALL, "train.iters=1", "hydra.sweep.dir=g")
    assert "1 job, 1 done" in inline("resume=g")


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"trial": 8, "job": 99}, "job 99"),
        ({"wave": 8, "asked": 1e6}, "cannot be understood"),
        ({"wave": 8, "asked": 2000}, "wave 8 asked for 2000 trials, and trial 9 is not there"),
        ({"result": -1}, "cannot be understood"),
    ],
)
def test_a_line_that_does_not_fit_is_refused_and_starts_nothing(inline, sweep, change, problem):
    lines = [json.loads(line) for line in (sweep / "search.jsonl").read_text().splitlines()]
    key = next(iter(change))
    place = next(i for i, line in enumerate(lines) if key in line and (change[key] < 0 or line[key] == change[key]))
    lines[place] |= change
    (sweep / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = read_manifest(sweep)
    out = inline("resume=s", expect=2)
    assert problem in out and read_manifest(sweep).jobs == manifest.jobs


def test_a_trial_at_its_end_whose_folder_is_gone_is_trained_again_and_a_stopped_one_stays_as_recorded(inline, sweep):
    found = read_search(sweep)
    assert found is not None
    winner = next(trial.job for trial in found.trials if len(trial.results) == 3)
    loser = next(trial.job for trial in found.trials if len(trial.results) == 1)
    before = (sweep / f"{winner}/adapters/adapters.safetensors").read_bytes()
    for job in (winner, loser):
        shutil.rmtree(sweep / str(job))
    out = inline("resume=s")
    assert f"the folder of its job {winner} is gone, so it is trained again" in out
    assert (sweep / f"{winner}/adapters/adapters.safetensors").read_bytes() == before
    assert not (sweep / str(loser)).exists() and f"the folders of trial {loser} are gone" in out
    after = read_search(sweep)
    assert after is not None and after.trials == found.trials


def test_a_trial_that_waits_is_not_continued_by_itself(inline, sweep):
    found = read_search(sweep)
    assert found is not None
    waiting = next(trial for trial in found.trials if len(trial.results) == 2)
    out = inline(f"resume=s/{waiting.job}", expect=2)
    assert "stopped at update 3, and the search decides" in out and "resume=s\n" in out
    assert f"resume=s/{waiting.job}/checkpoints/step-0000003" in out
    status = json.loads((sweep / f"{waiting.job}/status.json").read_text())
    (sweep / f"{waiting.job}/status.json").write_text(json.dumps(status | {"state": "interrupted", "step": 2}))
    shutil.rmtree(sweep / f"{waiting.job}/checkpoints/step-0000003")
    assert "trains to update 3" in inline(f"resume=s/{waiting.job}")
    assert json.loads((sweep / f"{waiting.job}/status.json").read_text())["step"] == 3


def test_fail_fast_ends_a_search_and_leaves_what_did_not_start(inline):
    options = ("optimizer=sgd", "optimizer.learning_rate=1e30,1e-2,1e-3", "lora.rank=2", "train.iters=2")
    out = inline(*SEARCH, *options, "hydra.launcher.fail_fast=true", "hydra.sweep.dir=s", expect=1)
    assert "fail_fast ends the search here" in out
    found = read_search(inline.folder / "s")
    assert found is not None
    assert [[result.state for result in trial.results] for trial in found.trials] == [["diverged"], [], []]
    inline("resume=s", "hydra.launcher.fail_fast=false", expect=1)
    found = read_search(inline.folder / "s")
    assert found is not None
    assert [trial.results[-1].state for trial in found.trials] == ["diverged", "finished", "paused"]


def test_a_seed_that_fails_is_named_and_tried_again(inline, sweep):
    (sweep / "9").mkdir()
    (sweep / "9/of-another-program").write_text("")
    out = inline("resume=s", "hydra.sweeper.seeds=2", "hydra.sweeper.finalists=1", expect=1)
    assert re.search(r"trial \d with seed 1 failed", out) and "1 of 10 jobs failed" in out
    shutil.rmtree(sweep / "9")
    inline("resume=s")
    assert states(sweep)[9] == "finished"


def test_a_job_that_stops_says_the_loss_of_its_step(inline):
    high = ("train.eval_every=1", "lora.dropout=0", "optimizer.learning_rate=0.5")
    out = inline("-m", *SMALL, *high, "train.stop_at=4", "hydra.sweep.dir=g")
    rows = [json.loads(line) for line in (inline.folder / "g/0/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "valid"}
    assert min(losses.values()) < losses[4]
    assert re.search(rf"stopped +4/9  valid loss {losses[4]:.4f}", out)


def test_a_search_without_m_says_that_it_is_a_single_run(inline):
    out = inline(*SMALL, "hydra/sweeper=search", "train.iters=1", "hydra.run.dir=r")
    assert "hydra/sweeper=search has no effect on a single run: add -m" in out


def test_a_signal_between_jobs_ends_the_search_with_its_table(inline, monkeypatch):
    from runner.sweeps.search.study import Study

    ask = Study.ask

    def ask_and_signal(study, **options):
        if len(study._trials) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(study, **options)

    monkeypatch.setattr(Study, "ask", ask_and_signal)
    out = inline(*SEARCH, "hydra.sweeper.trials=2", "train.iters=2", "hydra.sweep.dir=s", expect=143)
    assert "2 trials: 1 waiting, 1 not started" in out and "finish      python -m runner resume=s" in out
    monkeypatch.undo()
    assert "2 trials: 1 finished, 1 stopped" in inline("resume=s")


@pytest.mark.parametrize("launcher", ["process", pytest.param("joblib", marks=pytest.mark.long)])
def test_a_search_runs_under_other_launchers(cli, assert_equal_runs, launcher):
    # A sampler that does not depend on how many jobs run at once.
    options = ("hydra.sweeper.sampler=random", "hydra.sweeper.trials=4", "hydra.sweeper.eta=2", "train.iters=4")
    cli(*SEARCH, *options, "hydra.sweep.dir=serial")
    cli(*SEARCH, *options, f"hydra/launcher={launcher}", "hydra.sweep.dir=other")
    assert states(cli.folder / "serial") == states(cli.folder / "other")
    for number in range(4):
        assert_equal_runs(cli.folder / f"serial/{number}", cli.folder / f"other/{number}")


def _journal(sweep: Path) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(sweep / "optuna-journal.log")))


@pytest.mark.long
def test_optuna_dashboard_shows_the_study(sweep):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(Path(sys.executable).with_name("optuna-dashboard")), str(sweep / "optuna-journal.log")]
    process = subprocess.Popen([*words, f"--port={port}", "--server=wsgiref"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies/0") as reply:
                    study = json.load(reply)
                break
            except OSError:
                time.sleep(0.1)
        assert sorted(trial["state"] for trial in study["trials"]) == ["Complete", *["Pruned"] * 8]
        assert {param["name"] for param in study["trials"][0]["params"]} == {"optimizer.learning_rate", "lora.rank"}
    finally:
        process.terminate()
        process.wait()
