"""Jobs that differ by their seed alone are one row: mean and sample standard deviation of the objective."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.reports.screen import Screen
from runner.reports.seed_groups import print_seed_groups, seed_groups
from runner.runs.inspect import RunInfo
from runner.runs.objective import Objective


def runs(*settings: tuple[int, int, float | None]) -> list[RunInfo]:
    """Finished runs of (rank, seed, valid loss)."""
    return [
        RunInfo(path=Path(str(number)), state="finished", best_loss=loss, settings={"lora.rank": rank, "seed": seed})
        for number, (rank, seed, loss) in enumerate(settings)
    ]


def test_the_better_mean_comes_first_and_missing_values_are_counted(capsys):
    found = seed_groups(runs((2, 0, 3.0), (4, 0, 1.0), (2, 1, 4.0), (4, 1, 1.5), (4, 2, None)), Objective())
    assert [(group.settings, group.values) for group in found] == [
        ({"lora.rank": 4}, [1.0, 1.5]),
        ({"lora.rank": 2}, [3.0, 4.0]),
    ]
    assert found[0].mean == 1.25 and found[0].deviation == pytest.approx(0.353553, abs=1e-6)
    print_seed_groups(found, "valid_loss", Screen())
    out = capsys.readouterr().out
    assert "1.2500 ± 0.3536" in out and "2 of 3" in out


def test_a_higher_score_comes_first_where_the_objective_says_so():
    found = seed_groups(runs((2, 0, 3.0), (4, 0, 1.0), (2, 1, 4.0), (4, 1, 1.5)), Objective("valid_loss", True))
    assert [group.settings["lora.rank"] for group in found] == [2, 4]


@pytest.mark.parametrize("grid", [[(2, 0, 1.0), (4, 0, 2.0)], [(2, 0, 1.0), (4, 1, 2.0)], [(2, 0, 1.0)]])
def test_there_are_no_groups_where_no_two_runs_differ_by_the_seed_alone(grid):
    assert seed_groups(runs(*grid), Objective()) == []
