"""A search is reported everywhere in the same way: its rungs, where and why each trial was stopped, its best job."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from searched_sweeps import LOSSES, RUNGS, record_lines, write_search

from runner.cleaning.facts import Context
from runner.cli.commands import best, compare, ls, show
from runner.reports.html.sweep_report import sweep_report
from runner.reports.next_commands import for_sweep
from runner.reports.screen import Screen
from runner.reports.search_summary import (
    SearchSummary,
    header_lines,
    read_summary,
    search_fields,
    summarize_sweep,
    tried_text,
)
from runner.reports.sweep_page import print_sweep_page, sweep_page_fields
from runner.reports.sweep_results import SweepResults, print_sweep_results, read_sweep_results, results_csv
from runner.reports.verdict import Names, judge
from runner.runs.find import read_sweep
from runner.runs.inspect import read_run
from runner.runs.search_record import read_rungs
from runner.runs.sweep_manifest import read_manifest

FIRST_RUNG = ["10", "8", "2", "1.1000", "1.0500", "2"]
BEST_FIRST = ["1", "4", "6", "2", "0", "3", "5", "8", "7"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_search(tmp_path_factory.mktemp("searches") / "s").folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A search that has come to its end; of this test alone."""
    return shutil.copytree(written, tmp_path / "s")


def summary_of(folder: Path) -> SearchSummary:
    summary, problem = summarize_sweep(read_sweep(folder))
    assert summary is not None and problem is None
    return summary


def results_of(folder: Path) -> tuple[SweepResults, str]:
    results, out = read_sweep_results(read_manifest(folder), {}), io.StringIO()
    print_sweep_results(results, Screen(out))
    return results, out.getvalue()


def edit(folder: Path, change: Any) -> None:
    """Write search.jsonl again with `change(lines)`."""
    lines = record_lines(folder)
    change(lines)
    (folder / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_each_trial_says_where_it_was_stopped_and_why(folder: Path) -> None:
    trials = {trial.number: trial for trial in summary_of(folder).trials}
    assert trials[6].text == "stopped at 10: place 3 of 8, valid loss 1.2000; those up to 1.1000 continued"
    assert trials[6].short == "place 3 of 8 at 10, cut 1.1000"
    assert trials[4].text == "stopped at 30: place 2 of 2, valid loss 0.9500; those up to 0.9000 continued"
    assert (trials[1].state, trials[1].text) == ("finished", "trained to its end at step 90")
    assert (trials[7].state, trials[7].text) == ("diverged", "diverged at step 7: the loss is not finite")
    assert (trials[8].state, trials[8].text) == ("failed", "failed at step 5: OutOfMemory: 3 GB")
    assert tried_text(summary_of(folder)) == "9 trials: 1 finished, 6 stopped, 1 diverged, 1 failed"
    reason = "the budget holds 9 trials at 1.2 s an update"
    assert search_fields(summary_of(folder))["planned"] == [{"trials": 9, "reason": reason}]


def test_each_rung_says_how_many_reached_it_and_up_to_where_they_continued(folder: Path) -> None:
    first, second, end = summary_of(folder).rungs
    assert (first.step, first.reached, first.continued, first.cut, first.best, first.lost) == (10, 8, 2, 1.10, 1.05, 2)
    assert (second.step, second.reached, second.continued, second.cut, second.lost) == (30, 2, 1, 0.90, 0)
    assert (end.step, end.reached, end.continued, end.cut, end.best, end.is_end) == (90, 1, 0, None, 0.80, True)

    def change(lines: list[dict]) -> None:
        (line,) = [line for line in lines if line.get("result") == 1 and line["step"] == 90]
        line["judged"] = 0.85  # the lowest validation loss was before the end

    edit(folder, change)
    assert summary_of(folder).rungs[-1].best == 0.80


def test_the_best_is_the_same_everywhere_and_never_a_trial_that_was_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The job that failed has a lower loss than any other that was not trained to its end.
    monkeypatch.chdir(folder.parent)
    sweep = read_sweep(folder)
    assert [run.path.name for run in sweep.objective.rank(sweep.runs)] == BEST_FIRST
    results, _ = results_of(folder)
    assert [str(result.job.number) for result in results.jobs] == BEST_FIRST
    rows = list(csv.DictReader(io.StringIO(results_csv(results))))
    assert [row["job"] for row in rows] == BEST_FIRST
    assert [run["run"] for run in sweep_page_fields(sweep)["runs"]] == BEST_FIRST
    page = sweep_report(sweep)
    (table,) = [part for part in page.parts if part.get("id") == "jobs"]
    assert [row["cells"][0]["text"] for row in table["rows"]] == BEST_FIRST
    assert page.state == "finished"
    ranks = Context.of([sweep]).ranks
    assert sorted(ranks, key=ranks.__getitem__) == [(folder / name).resolve() for name in BEST_FIRST[:-1]]
    assert best.run(["s"]) == 0 and capsys.readouterr().out == "s/1\n"
    assert ls.run(["s"]) == 0 and "0.8000 in 1" in capsys.readouterr().out
    assert read_run(folder / "4").rung == 30 and read_run(folder / "1").rung is None  # found by itself, too
    assert compare.run(["s/1", "s/4"]) == 0
    assert "not compared: job 4 (not trained to its end by the search)" in capsys.readouterr().out


def test_the_tables_show_the_search(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, at_the_end = results_of(folder)
    assert show.run([str(folder)]) == 0
    for text in (at_the_end, capsys.readouterr().out):
        assert "search: 9 trials: 1 finished, 6 stopped, 1 diverged, 1 failed" in text
        assert "options     sampler=tpe pruner=halving eta=3 seed=0 judged by valid_loss" in text
        assert "space       optimizer.learning_rate=tag(log,interval(1e-5,1e-2))" in text
        assert "plan        the budget holds 9 trials at 1.2 s an update" in text
        assert "time        6m40s, of it 6m20s in jobs: 300 updates" in text
        assert [line.split() for line in text.splitlines() if re.search(r"1\.1000 +1\.0500", line)] == [FIRST_RUNG]
        assert "place 3 of 8 at 10, cut 1.1000" in text
        assert "resume=" in text and "hydra.sweeper.trials=18 hydra.sweeper.budget=16h" in text
        assert "train.iters=180" in text


def test_results_csv_has_the_end_of_each_trial(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(results_of(folder)[0]))))
    assert [row["trial_state"] for row in rows] == ["finished", *["stopped"] * 6, "failed", "diverged"]
    assert rows[2]["trial_reason"].startswith("stopped at 10: place 3 of 8") and rows[2]["trial"] == "6"


def test_a_search_that_was_killed_waits_to_be_resumed(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "s", finished=False).folder
    summary = summary_of(folder)
    assert [trial.state for trial in summary.trials] == ["waiting"] * 7 + ["diverged", "failed"]
    assert summary.trials[0].text == "waits at step 10, where nothing is decided yet" and not summary.is_complete
    commands = for_sweep(read_sweep(folder), summary)
    assert commands[0].purpose == "finish the search" and commands[0].line.endswith(f"resume={folder}")
    assert not any("hydra.sweeper" in command.line for command in commands)
    verdict = judge(read_sweep(folder).runs, read_sweep(folder).objective, Names.of_jobs(read_sweep(folder).runs))
    assert not verdict.candidates and verdict.problem == "the search has trained no job to its end yet"


def test_a_trial_that_waits_while_others_of_its_rung_continue_has_its_place(folder: Path) -> None:
    stopped = {trial.number: trial for trial in summary_of(folder).trials}

    def change(lines: list[dict]) -> None:
        lines[:] = [line for line in lines if "stopped" not in line]

    edit(folder, change)
    summary = summary_of(folder)
    for number in (0, 2, 3, 4, 5, 6):  # what is recorded at the end of a search is what its rungs say before
        assert summary.trials[number].text == stopped[number].text.replace("stopped", "waits")
        assert summary.trials[number].state == "waiting" and summary.trials[number].short == stopped[number].short


def test_a_trial_that_is_being_continued_is_not_the_rung_that_it_left(tmp_path: Path) -> None:
    searched = write_search(tmp_path / "s", finished=False)
    searched.train(4, {5: 1.3, 10: 1.05, 20: 1.0}, "running")  # by a process that was killed
    trial = summary_of(searched.folder).trials[4]
    assert (trial.state, trial.step, trial.text) == ("interrupted", 20, "interrupted at step 20")
    assert read_run(searched.folder / "4").rung == 10 and not summary_of(searched.folder).is_complete


@pytest.mark.parametrize("state", ["failed", "diverged", "finished", "stopped"])
def test_a_trial_without_a_recorded_result_is_left_for_a_resume(folder: Path, state: str) -> None:
    def change(lines: list[dict]) -> None:
        lines[:] = [line for line in lines if line.get("result") != 8]

    edit(folder, change)
    status = json.loads((folder / "8/status.json").read_text())
    (folder / "8/status.json").write_text(json.dumps(status | {"state": state}))
    trial = summary_of(folder).trials[8]
    assert (trial.state, trial.text) == ("waiting", f"{state} at step 5") and not summary_of(folder).is_complete


def test_trials_of_equal_settings_count_once_and_early_stopping_is_an_end(folder: Path) -> None:
    def change(lines: list[dict]) -> None:
        lines.append({"trial": 9, "job": 4, "params": {"lora.rank": 8, "optimizer.learning_rate": 0.0005}})
        lines.append({"trial": 10, "job": None, "params": {"lora.rank": 16, "optimizer.learning_rate": 1.0}})
        lines.append({"result": 10, "step": 0, "values": [], "state": "failed", "reason": "no run can have this"})
        for line in lines:
            if line.get("result") == 1 and line["step"] == 90:
                line["step"] = 60

    edit(folder, change)
    summary = summary_of(folder)
    assert (summary.trials[9].state, summary.trials[9].text) == ("repeats", "has the settings of trial 4")
    assert summary.trials[10].text == "failed at step 0: no run can have this" and summary.is_complete
    assert ("cannot run", "trial 10: no run can have this") in header_lines(summary)
    assert summary.trials[1].text == "trained to its end at step 60 by early stopping"
    assert [rung.reached for rung in summary.rungs] == [8, 2, 1] and summary.rungs[0].lost == 3
    assert summary.by_job[4].number == 4


def test_the_best_that_is_trained_to_its_end_says_why(folder: Path) -> None:
    def change(lines: list[dict]) -> None:
        (wave,) = [line for line in lines if line.get("wave") == 2]
        del wave["continued"][0]["cut"]
        wave["continued"][0]["reason"] = "the best is trained to its end"
        lines[0]["earlier"] = [{"params": {}, "values": [1.0]}] * 2
        lines.append({"extended": {"trials": 60, "budget": "16h"}, "wave": 3})

    edit(folder, change)
    summary = summary_of(folder)
    assert ("to the end", "trial 1 from 30: the best is trained to its end") in header_lines(summary)
    assert ("began with", "2 results of an earlier sweep (warm_from)") in header_lines(summary)
    assert ("extended", "to trials=60 budget=16h before wave 3") in header_lines(summary)
    assert summary.rungs[1].continued == 1 and summary.rungs[1].cut is None
    assert summary.trials[4].text == "stopped at 30: place 2 of 2, valid loss 0.9500; none continued"
    assert summary.options["budget"] == "16h"
    assert for_sweep(read_sweep(folder), summary)[-2].line.endswith("/s hydra.sweeper.budget=32h")  # time was short


def test_a_search_whose_sampler_repeats_itself_is_not_offered_more_trials(folder: Path) -> None:
    params = {"lora.rank": 8, "optimizer.learning_rate": 0.0005}
    assert "search on" in [command.purpose for command in for_sweep(read_sweep(folder), summary_of(folder))]
    edit(folder, lambda lines: lines.extend({"trial": n, "job": 4, "params": params} for n in range(9, 29)))
    purposes = [command.purpose for command in for_sweep(read_sweep(folder), summary_of(folder))]
    assert "search on" not in purposes and "compare finalists over seeds" in purposes


def test_other_seeds_of_the_best_are_its_replicates(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "s", seeds=(1, 2)).folder
    out = io.StringIO()
    print_sweep_page(read_sweep(folder), Screen(out))
    assert "trial 1 with seed 2" in out.getvalue() and "3 of 3  0.8010 ± 0.0010" in out.getvalue()
    assert out.getvalue().count(" of 1 ") == 0  # trials that were stopped are no row of the table over seeds
    assert "none: the search trained fewer than two settings to their end" in out.getvalue()
    assert search_fields(summary_of(folder))["trials"][1]["seeds"] == {1: 9, 2: 10}
    rows = list(csv.DictReader(io.StringIO(results_csv(results_of(folder)[0]))))
    assert [(row["job"], row["trial"], row["trial_reason"]) for row in rows[1:3]] == [
        ("9", "1", "with seed 1"),
        ("10", "1", "with seed 2"),
    ]
    assert summary_of(folder).is_complete
    status = json.loads((folder / "10/status.json").read_text())
    (folder / "10/status.json").write_text(json.dumps(status | {"state": "stopped", "step": 30}))
    assert not summary_of(folder).is_complete
    shutil.rmtree(folder / "10")
    assert not summary_of(folder).is_complete


def test_the_best_of_a_search_is_a_trial_whose_mean_over_seeds_is_best_not_the_luckiest_seed(tmp_path: Path) -> None:
    searched = write_search(tmp_path / "s", seeds=(1, 2))
    folder = searched.folder
    searched.train(9, {90: 0.70}, "finished")
    assert (read_sweep(folder).best or read_run(folder / "9")).path.name == "1"
    searched.train(4, {30: 0.95, 90: 0.81}, "finished")  # another finalist, with its seeds
    for seed in (1, 2):
        job = searched.add_job(lora__rank=8, optimizer__learning_rate=5e-4, seed=seed)
        edit(folder, lambda lines, job=job, seed=seed: lines.append({"replicate": 4, "job": job, "seed": seed}))
        searched.train(job, {90: 0.72}, "finished")
    assert (read_sweep(folder).best or read_run(folder / "9")).path.name == "4"


def test_a_budget_that_was_short_is_named_and_the_next_one_is_above_what_was_spent(folder: Path) -> None:
    def change(lines: list[dict]) -> None:
        lines[0]["options"]["budget"] = "1m"
        lines.append({"missed": ["3 of 9 trials", "seeds 1, 2 of trial 1"]})

    edit(folder, change)
    summary = summary_of(folder)
    assert ("left out", "for lack of time: 3 of 9 trials; seeds 1, 2 of trial 1") in header_lines(summary)
    assert for_sweep(read_sweep(folder), summary)[-2].line.endswith("/s hydra.sweeper.budget=14m")  # 400 s were spent


def test_several_metrics_mark_the_front_in_every_table(tmp_path: Path) -> None:
    searched = write_search(tmp_path / "s", metric=["valid_loss", "tokens_per_second"])
    searched.train(4, {30: 0.95, 90: 0.90}, "finished", seconds_per_update=0.5)
    searched.train(6, {30: 0.97, 90: 0.95}, "finished")
    _, text = results_of(searched.folder)
    lines = {line.split()[0]: line.split() for line in text.partition("verdict")[0].splitlines() if line.strip()}
    assert "*" in lines["1"] and "*" in lines["4"] and "*" not in lines["6"]
    assert "no other job is better in one of valid_loss, tokens_per_second without being worse in another" in text
    rows = list(csv.DictReader(io.StringIO(results_csv(results_of(searched.folder)[0]))))
    assert [row["pareto_front"] for row in rows[:4]] == ["1", "1", "0", "0"]
    assert [row["tokens_per_second"] for row in rows[:3]] == ["100.0", "200.0", "100.0"]
    fields = sweep_page_fields(read_sweep(searched.folder))
    assert [run["on_pareto_front"] for run in fields["runs"]] == [True, True] + [False] * 7
    assert fields["objective"]["others"] == [{"metric": "tokens_per_second", "maximize": True}]


def test_importance_is_measured_where_all_trials_are_comparable(folder: Path) -> None:
    values = summary_of(folder).values_at_first_rung()
    assert values == {number: loss for number, loss in enumerate(LOSSES) if loss is not None}
    (bars,) = [part for part in sweep_report(read_sweep(folder)).parts if part["kind"] == "bars"]
    assert "over the 7 trials that have a value at step 10, the first rung," in bars["note"]
    assert {item["name"] for item in bars["items"]} == {"lora.rank", "optimizer.learning_rate", "the rest"}


@pytest.mark.parametrize(
    "content",
    [
        "{}\n",
        "no json\n",
        '{"schema": 1, "rungs": [10, "x"]}\n{"trial": 0, "job": 0, "params": {}}\n',
        '{"schema": 1, "rungs": [10], "space": 3, "options": [], "judged_by": 4}\n',
        '{"schema": 1, "rungs": [10]}\n{"trial": 0, "job": 0, "params": {}}\n{"stopped": 0, "place": 1}\n',
        '{"schema": 1, "rungs": [10]}\n{"wave": 0, "asked": 1, "continued": [{"trials": []}]}\n',
        '{"schema": 1, "rungs": [10]}\n{"planned": 4}\n{"extended": 5}\n'
        '{"spent": 1, "jobs": 2, "updates": 3, "beside": 1, "starts": 1}\n',
        '{"schema": 9}\n',
    ],
)
def test_a_damaged_record_of_a_search_never_hides_the_jobs(folder: Path, content: str) -> None:
    (folder / "search.jsonl").write_text(content)
    out = io.StringIO()
    print_sweep_page(read_sweep(folder), Screen(out))
    _, at_the_end = results_of(folder)
    sweep_page_fields(read_sweep(folder))
    sweep_report(read_sweep(folder))
    for text in (out.getvalue(), at_the_end):
        assert "0.8000" in text


def test_a_torn_last_line_does_not_count(folder: Path) -> None:
    whole = (folder / "search.jsonl").read_text()
    (folder / "search.jsonl").write_text(whole + '{"stopped": 1, "st')
    assert search_fields(summary_of(folder)) == search_fields(read_summary(folder, {})[0] or summary_of(folder))
    assert read_rungs(folder) == list(RUNGS) and read_rungs(folder.parent) == []
