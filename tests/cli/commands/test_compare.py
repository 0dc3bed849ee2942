"""`runner compare` puts runs side by side, in the terminal and as JSON, and refuses what it cannot compare."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluated_runs import row_losses, write_run, write_sweep

from runner.reports.comparison import compare, name_runs, print_comparison
from runner.reports.screen import Screen
from runner.runs.inspect import RunInfo, read_run


@pytest.fixture
def runs(inline) -> Path:
    """Two runs, an old one, and a sweep of two jobs, in the working directory."""
    folder = inline.folder
    write_run(folder / "out/a", {0: row_losses(2), 10: row_losses(1.0), 20: row_losses(1.2)}, lora__rank=4)
    write_run(folder / "out/b", {0: row_losses(2), 10: row_losses(1.5), 20: row_losses(1.3, seed=1)}, lora__rank=8)
    write_run(folder / "out/old", {0: row_losses(2), 10: row_losses(1.1)}, rows=None, lora__rank=2)
    for number in range(2):
        write_run(folder / f"sweep/{number}", {10: row_losses(1.0 + number, seed=number)}, lora__rank=number + 1)
    write_sweep(folder / "sweep", 2)
    return folder


@pytest.mark.usefixtures("runs")
def test_settings_results_curves_and_verdict_are_printed(inline: Callable) -> None:
    out = inline("compare", "out/a", "out/b")
    assert "lora.rank" in out and "out/a" in out
    header = next(line for line in out.splitlines() if "valid_loss" in line)
    assert header.split() == ["run", "valid_loss", "last", "tokens", "tok/s", "in", "updates", "in", "all", "GB"]
    assert "A  1.0000 @10  1.2000   2,000    100         20s     23s  0.50" in out
    assert "b B" in out
    assert "B is worse than A by more than noise on these 60 rows (difference 0.3000, 95 % interval 0.2" in out


def test_the_names_of_runs_are_shown(inline: Callable, runs: Path) -> None:
    assert "name" not in inline("compare", "out/a", "out/b")
    inline("label", "out/b", "--name", "the big one")
    out = inline("compare", "out/a", "out/b")
    assert "the big one" in next(line for line in out.splitlines() if "out/b" in line)
    inline("label", "out/a", "--name", "the small one")
    (runs / "out").rename(runs / "outputs")  # where names are looked for
    assert "B is worse than A by more than noise" in inline("compare", "the small one", "the big one")


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(("axis", "end"), [("step", "step"), ("tokens", "2,000"), ("time", "seconds in updates")])
def test_curves_are_drawn_over_steps_tokens_and_time(inline: Callable, axis: str, end: str) -> None:
    out = inline("compare", "out/a", "out/b", "--x", axis)
    below = re.findall(r"\+-{20,}\n(.*)", out)[0]
    assert below.split()[0] == "0" and end in below and (axis in below or "seconds in updates" in below)


@pytest.mark.usefixtures("runs")
def test_jobs_of_a_sweep_are_compared_by_their_numbers_and_with_a_run_by_letters(inline: Callable) -> None:
    assert "job 1 is worse than job 0 by more than noise" in inline("compare", "sweep")
    assert "job 1 is worse than job 0 by more than noise" in inline("compare", "sweep/0", "sweep/1", "sweep")
    mixed = inline("compare", "sweep", "out/b")
    assert "  C  out/b" in mixed and "A is better than all others" in mixed


def test_of_more_than_eight_jobs_the_curves_of_the_best_are_drawn(inline: Callable) -> None:
    for number in range(10):
        write_run(inline.folder / f"sweep/{number}", {10: row_losses(2 - number / 20)}, lora__rank=number + 1)
    write_sweep(inline.folder / "sweep", 10)
    out = inline("compare", "sweep")
    assert "\njobs of sweep\n" in f"\n{out}" and "valid loss, the best 8 of 10\n" in out
    assert "loss of:  a 2  b 3  c 4  d 5  e 6  f 7  g 8  h 9\n" in out


def test_on_a_terminal_of_80_columns_all_settings_that_differ_can_be_read(tmp_path: Path) -> None:
    changes = {"optimizer__learning_rate": 3e-05, "schedule__warmup": 100, "lora__dropout": 0.05, "lora__rank": 4}
    paths = [
        write_run(tmp_path / "0", {10: row_losses(2)}, train__clip_norm=0.5),
        write_run(tmp_path / "1", {10: row_losses(1)}, train__batch_size=64, **changes),
    ]
    out = io.StringIO()
    screen = Screen(out)
    screen.width = 80
    print_comparison(compare([read_run(path) for path in paths]), screen)
    table, _, verdict = out.getvalue().partition("results")
    assert max(map(len, table.splitlines()[1:])) <= 80
    for text in ("learning_rate=3e-05", "warmup=100", "clip_norm=0.5", "dropout=0.05", "batch_size=64", "rank=4"):
        assert text in table and text in verdict


@pytest.mark.usefixtures("runs")
def test_an_old_run_is_compared_by_its_metrics_and_the_verdict_says_why_not(inline: Callable) -> None:
    out = inline("compare", "out/a", "out/old")
    assert "1.1000 @10" in out
    assert "none: there are no two to compare on the same rows" in out
    assert "not compared: B (no row_losses.jsonl: it was removed, or the run is of an earlier version)" in out


@pytest.mark.usefixtures("runs")
def test_json_has_everything(inline: Callable) -> None:
    document = json.loads(inline("compare", "out/a", "out/b", "--json"))
    assert document["differing"] == ["lora.rank"]
    assert [run["run"] for run in document["runs"]] == ["A", "B"]
    first = document["runs"][0]
    assert first["settings"] == {"lora.rank": 4}
    assert first["best"] == {"valid_loss": pytest.approx(1.0, abs=1e-5), "step": 10}
    assert (first["tokens"], first["seconds"], first["seconds_in_updates"]) == (2000, 23.0, 20.0)
    assert first["valid"][1] == {"step": 10, "tokens": 1000, "seconds": 10, "loss": pytest.approx(1.0, abs=1e-5)}
    (verdict,) = document["verdicts"]
    assert verdict["compared"][1]["runs"] == ["B"] and verdict["compared"][1]["worse"]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out/a"], "needs two runs or more"),
        (["out/a", "out/a"], "needs two runs or more"),
        (["out/a", "out/c"], "there is no such folder"),
        (["out/a", "out"], "python -m runner ls out"),
        ([], "RUN|SWEEP"),
        (["out/a", "out/b", "--x", "miles"], "miles"),
    ],
)
def test_what_cannot_be_compared_is_refused(inline: Callable, arguments: list[str], message: str) -> None:
    assert message in inline("compare", *arguments, expect=2)


def test_more_runs_than_letters_have_two() -> None:
    runs = [RunInfo(path=Path(f"run{i}"), state="finished") for i in range(703)]
    names = list(name_runs(runs).by_path.values())
    assert (names[0], names[25], names[26], names[701], names[702]) == ("A", "Z", "AA", "ZZ", "AAA")
    assert len(set(names)) == 703
