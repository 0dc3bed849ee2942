"""The verdict names the runs that are not distinguishable from the best, the cheapest, and why others are left out."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluated_runs import row_losses, write_run, write_sweep

from runner.reports.screen import Screen
from runner.reports.sweep_page import print_sweep_page, sweep_page_fields
from runner.reports.verdict import Names, Verdict, judge, verdict_fields
from runner.reports.verdict_table import left_out_lines, print_verdict, summary
from runner.runs import row_losses as recorded
from runner.runs.directory import RunDirectory
from runner.runs.find import read_sweep
from runner.runs.inspect import read_run
from runner.runs.objective import Objective

LOSS = Objective()


def judged(*folders: Path, objective: Objective = LOSS) -> tuple[Verdict, Names]:
    runs = [read_run(folder) for folder in folders]
    names = Names({run.path: run.path.name for run in runs})
    return judge(runs, objective, names), names


def text(verdict: Verdict, names: Names) -> str:
    out = io.StringIO()
    print_verdict(verdict, names, Screen(out))
    return out.getvalue()


def test_a_run_within_noise_is_not_distinguishable_and_one_beyond_it_is_worse(tmp_path: Path) -> None:
    a = write_run(tmp_path / "A", {0: row_losses(2), 10: row_losses(1.0)}, lora__rank=4)
    b = write_run(tmp_path / "B", {0: row_losses(2), 10: row_losses(1.004, seed=1)}, lora__rank=8)
    c = write_run(tmp_path / "C", {0: row_losses(2), 10: row_losses(1.2, seed=2)}, lora__rank=16)
    verdict, names = judged(c, b, a)
    assert [names.listed(candidate.runs) for candidate in verdict.candidates] == ["A", "B", "C"]
    assert [candidate.is_worse for candidate in verdict.candidates] == [False, False, True]
    assert [candidate.steps for candidate in verdict.candidates] == [[10]] * 3
    assert verdict.candidates[1].difference == pytest.approx(0.004, abs=1e-5)
    assert verdict.candidates[1].low < 0 < verdict.candidates[1].high
    assert verdict.rows == 60 and verdict.left_out == [] and not verdict.has_seeds
    sentence = "B is not distinguishable from A on these 60 rows (difference 0.0040, 95 % interval -0.0"
    assert sentence in text(verdict, names)
    assert "another seed may change the order" in text(verdict, names)
    worse, names = judged(c, a)
    assert summary(worse, names)[0].startswith("C is worse than A by more than noise on these 60 rows (difference 0.20")
    best, names = judged(c, a, write_run(tmp_path / "D", {10: row_losses(1.4, seed=3)}))
    assert summary(best, names)[0].startswith(
        "A is better than all others by more than noise on these 60 rows; the nea"
    )


def test_the_best_evaluation_of_each_run_is_compared(tmp_path: Path) -> None:
    a = write_run(tmp_path / "A", {10: row_losses(1.0), 20: row_losses(1.5)})
    b = write_run(tmp_path / "B", {10: row_losses(2.0), 20: row_losses(1.0, seed=1)}, lora__rank=16)
    verdict, names = judged(a, b)
    assert {names.listed(c.runs): c.steps for c in verdict.candidates} == {"A": [10], "B": [20]}
    assert {names.listed(c.runs): c.seconds for c in verdict.candidates} == {"A": 10, "B": 20}


def test_a_verdict_on_runs_with_different_numbers_of_evaluations_says_so(tmp_path: Path) -> None:
    """The lowest of twelve losses is lower than that of one, also where nothing else differs."""
    a = write_run(tmp_path / "A", {0: row_losses(2), **{step: row_losses(1.0, seed=step) for step in range(1, 13)}})
    b = write_run(tmp_path / "B", {0: row_losses(2), 12: row_losses(1.0, seed=20)}, lora__rank=16)
    c = write_run(tmp_path / "C", {12: row_losses(1.0, seed=21)}, lora__rank=32)
    note = "evaluated 1 to 12 times, compared at the lowest loss: the more evaluations, the lower by selection alone"
    assert note in summary(*judged(a, b, c))
    assert not any("evaluated" in line for line in summary(*judged(b, c)))


def test_the_cheapest_trained_the_shortest_time_until_its_result(tmp_path: Path) -> None:
    a = write_run(tmp_path / "A", {10: row_losses(1.0), 20: row_losses(1.5)}, seconds_per_update=9.0)
    b = write_run(tmp_path / "B", {10: row_losses(1.003, seed=1)}, seconds_per_update=7.0, lora__rank=16)
    c = write_run(tmp_path / "C", {10: row_losses(1.9, seed=2)}, seconds_per_update=1.0, lora__rank=32)
    verdict, names = judged(a, b, c)
    assert verdict.cheapest is not None and names.listed(verdict.cheapest.runs) == "B"
    assert "cheapest of these: B, 1m10s in updates (the best: 1m30s)" in text(verdict, names)
    last = write_run(tmp_path / "D", {10: row_losses(1.0)}, status={"result_step": 5}, seconds_per_update=2.0, seed=9)
    verdict, names = judged(last, c)
    assert verdict.cheapest is not None and verdict.cheapest.seconds == 10


def test_of_nearly_equal_times_the_smallest_adapter_is_the_cheapest(tmp_path: Path) -> None:
    folders = []
    for name, rank, seconds in (("A", 16, 1.0), ("B", 4, 1.05), ("C", 8, 1.09), ("D", 1, 1.2)):
        losses = {10: row_losses(1.0 + rank / 5000, seed=rank)}
        folders.append(write_run(tmp_path / name, losses, seconds_per_update=seconds, lora__rank=rank))
        (folders[-1] / "adapters").mkdir()
        (folders[-1] / "adapters/adapters.safetensors").write_bytes(b"x" * rank)
    verdict, names = judged(*folders)
    assert len(verdict.equals) == 3 and verdict.cheapest is not None
    assert names.listed(verdict.cheapest.runs) == "B"


def test_seeds_of_the_same_settings_are_replicates(tmp_path: Path) -> None:
    folders = []
    for rank, levels in ((4, (1.0, 1.2, 0.9)), (8, (1.05, 1.15, 1.0))):
        for seed, level in enumerate(levels):
            folders.append(tmp_path / f"{rank}-{seed}")
            write_run(folders[-1], {10: row_losses(level, seed=seed + rank)}, lora__rank=rank, seed=seed)
    verdict, names = judged(*folders)
    assert verdict.has_seeds
    assert [names.listed(c.runs) for c in verdict.candidates] == ["4-0, 4-1, 4-2", "8-0, 8-1, 8-2"]
    assert verdict.candidates[0].value == pytest.approx(3.1 / 3, abs=1e-4)
    one_seed, _ = judged(folders[0], folders[3])
    assert one_seed.candidates[1].high - one_seed.candidates[1].low < 0.1
    assert verdict.candidates[1].high - verdict.candidates[1].low > 0.3
    assert "over rows and seeds" in text(verdict, names)
    assert "8-0, 8-1, 8-2 are not distinguishable from 4-0, 4-1, 4-2 on these 60 rows" in text(verdict, names)


def test_runs_that_cannot_be_compared_are_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = write_run(tmp_path / "A", {10: row_losses(1.0)})
    b = write_run(tmp_path / "B", {10: row_losses(1.1, seed=1)}, lora__rank=16)
    old = write_run(tmp_path / "old", {10: row_losses(0.5)}, rows=None, lora__rank=1)
    other = write_run(tmp_path / "other", {10: row_losses(1.3)}, rows="cd" * 32, lora__rank=2)
    upgraded = write_run(tmp_path / "upgraded", {10: row_losses(1.3)}, lora__rank=3)
    (upgraded / "row_losses.jsonl").write_text("")
    monkeypatch.setattr(recorded, "MAX_ROWS", 50)
    large = write_run(tmp_path / "large", {10: row_losses(1.3)}, lora__rank=5)
    monkeypatch.undo()
    diverged = write_run(tmp_path / "diverged", {10: row_losses(0.1)}, state="diverged", lora__rank=64)
    running = write_run(tmp_path / "running", {10: row_losses(0.9)}, state="running", lora__rank=65)
    held = RunDirectory(running)
    held.lock()
    verdict, names = judged(a, b, old, other, upgraded, diverged, running, large)
    held.unlock()
    assert [names.listed(c.runs) for c in verdict.candidates] == ["A", "B"]
    assert left_out_lines(verdict, names) == [
        "not compared: old (no row_losses.jsonl: it was removed, or the run is of an earlier version)",
        "not compared: running (still running)",
        "not compared: upgraded (no losses of the valid rows at step 10)",
        "not compared: large (evaluated on more than 200,000 rows, of which no losses are kept)",
        "not compared: other (evaluated on other rows or tokens than the rest, or with another method's loss)",
    ]
    none, names = judged(a, old)
    assert none.candidates == [] and none.cheapest is None
    assert "none: there are no two to compare on the same rows" in text(none, names)
    assert "the run is of an earlier version)" in text(none, names)
    few = [write_run(tmp_path / f"few{i}", {10: row_losses(1.0)[:4]}, rows="ef" * 32, seed=i, lora__rank=i + 1)
           for i in range(2)]  # fmt: skip
    assert "4 rows say too little" in str(judged(*few)[0].problem)


def test_damaged_losses_do_not_break_the_verdict(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{i}", {10: row_losses(1.0, seed=i)[:size]}, lora__rank=i + 1)
        for i, size in enumerate((60, 60, 20))
    ]
    file = folders[1] / "row_losses.jsonl"
    for losses in ("1e308, " * 59 + "1e308", ", ".join(["-1e308", "1e308"] * 30), ", ".join(["0"] * 60)):
        head = file.read_text().partition('"losses": ')[0]
        file.write_text(f'{head}"losses": [{losses}], "tokens": {[1] * 60}}}\n')
        with np.errstate(all="ignore"):
            verdict, names = judged(*folders)
            assert text(verdict, names).startswith("\nverdict")
            verdict_fields(verdict, names)
        assert [run.path.name for run, _ in verdict.left_out] == ["2"]


def test_scores_are_compared_answer_by_answer_and_higher_is_better(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    right, wrong = [1.0] * 30 + [0.0] * 10, [0.0] * 30 + [1.0] * 10
    near = [float(score) for score in random.permutation(right)]
    a = write_run(tmp_path / "A", {10: row_losses(1)}, scores=right, lora__rank=1)
    b = write_run(tmp_path / "B", {10: row_losses(1)}, scores=wrong, lora__rank=2)
    c = write_run(tmp_path / "C", {10: row_losses(1)}, scores=near, lora__rank=3)
    d = write_run(tmp_path / "D", {10: row_losses(1)}, scores=right[:-1], lora__rank=4)
    e = write_run(tmp_path / "E", {10: row_losses(1)}, lora__rank=5)
    verdict, names = judged(a, b, c, d, e, objective=Objective("score", maximize=True))
    assert [(names.listed(c.runs), c.is_worse) for c in verdict.candidates] == [
        ("A", False),
        ("C", False),
        ("B", True),
    ]
    assert verdict.candidates[2].value == 0.25 and verdict.candidates[2].difference == 0.5
    assert [(run.path.name, reason) for run, reason in verdict.left_out] == [
        ("D", "evaluated on other rows or tokens than the rest, or with another method's loss")
    ]


def test_a_score_of_zero_is_shown_as_zero(tmp_path: Path) -> None:
    for name in ("A", "B"):
        write_run(tmp_path / name, {10: row_losses(1)}, scores=[0.0] * 8, lora__rank=ord(name))
    verdict, names = judged(tmp_path / "A", tmp_path / "B", objective=Objective("score", maximize=True))
    assert "best: 0.0000" in text(verdict, names)


def test_the_page_of_a_sweep_has_the_verdict_in_text_and_json(tmp_path: Path) -> None:
    for number, (rank, seed) in enumerate((rank, seed) for rank in (4, 8) for seed in (0, 1)):
        losses = {0: row_losses(2), 10: row_losses(1.0 + rank / 20, seed=number)}
        write_run(tmp_path / str(number), losses, lora__rank=rank, seed=seed)
    sweep = read_sweep(write_sweep(tmp_path, 4))
    out = io.StringIO()
    print_sweep_page(sweep, Screen(out))
    assert "verdict: validation loss of the same 60 rows" in out.getvalue()
    assert "jobs 2, 3 are worse than jobs 0, 1 by more than noise" in out.getvalue()
    fields = sweep_page_fields(sweep)["verdict"]
    assert [entry["runs"] for entry in fields["compared"]] == [["0", "1"], ["2", "3"]]
    assert [entry["worse"] for entry in fields["compared"]] == [False, True]
    assert fields["cheapest"] == ["0", "1"] and fields["over_seeds"] and fields["problem"] is None


def test_a_hundred_jobs_are_judged_without_mlx(tmp_path: Path) -> None:
    for number in range(120):
        write_run(tmp_path / str(number), {10: row_losses(1.0 + number / 1000, seed=number)}, lora__rank=number + 1)
    script = (
        "import sys; from pathlib import Path; from runner.reports.sweep_page import sweep_page_fields; "
        "from runner.runs.find import read_sweep; "
        f"verdict = sweep_page_fields(read_sweep(Path({str(write_sweep(tmp_path, 120))!r})))['verdict']; "
        "assert not [name for name in sys.modules if name.startswith('mlx')]; "
        "print(len(verdict['compared']), len(verdict['left_out']), verdict['compared'][0]['runs'])"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).split() == ["100", "20", "['0']"]


def test_a_verdict_as_data_has_every_number(tmp_path: Path) -> None:
    a = write_run(tmp_path / "A", {10: row_losses(1.0)})
    b = write_run(tmp_path / "B", {10: row_losses(1.1, seed=1)}, lora__rank=16)
    fields = verdict_fields(*judged(a, b))
    assert fields["metric"] == "valid_loss" and fields["rows"] == 60 and fields["left_out"] == {}
    assert fields["compared"][0] == {
        "runs": ["A"],
        "steps": [10],
        "evaluations": [1],
        "value": pytest.approx(1.0, abs=1e-5),
        "difference": 0.0,
        "low": 0.0,
        "high": 0.0,
        "worse": False,
        "seconds_in_updates": 10.0,
    }
