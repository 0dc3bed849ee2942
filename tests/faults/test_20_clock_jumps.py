"""The clock jumps a year, between two starts and while a run is at work: newest, rotation and result stay the same."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = [pytest.mark.fault(20), pytest.mark.slow]

YEAR = 31_536_000
KEEP_TWO = "checkpoint.keep_last=2"


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_told_without_negative_ages(cli):
    """ls and show, by the true clock."""
    for overrides in (("ls", "."), ("show", "run")):
        out = cli(*overrides)
        assert "run" in out and not re.search(r"(?<![\w.-])-\d", out), out
    (found,) = json.loads(cli("ls", ".", "--json"))["entries"]
    assert (found["state"], found["step"]) == ("finished", 8)


@pytest.mark.long
def test_a_run_that_goes_on_a_year_ahead_and_then_a_year_back_ends_equal(
    cli, overrides, logged, faulty, newest, ended_equal
):
    whole, _ = logged(*overrides, KEEP_TWO)
    run = cli.folder / "run"
    cli(*overrides, KEEP_TWO, "hydra.run.dir=run", "train.stop_at=3")
    for jump, stop, kept in ((YEAR, 5, {2, 4, 5}), (-YEAR, 7, {4, 6, 7}), (0, 8, {6, 8})):
        kept.add(newest(run).checkpoint.step)  # what a process goes on from stays while it lives
        cli("resume=run", f"train.stop_at={stop}", env=faulty(clock=f"{jump:+d}"))
        assert names_of(run / "checkpoints") == [f"step-{step:07d}" for step in sorted(kept)], jump
        assert newest(run).checkpoint.step == stop
    ended_equal(whole, run)


def test_a_clock_that_jumps_while_a_run_is_at_work_changes_nothing(
    make_cli, tmp_path, overrides, driven, logged, faulty, ended_equal, cases
):
    """Nor does it make a save due that is due every so many minutes."""
    whole, _ = logged(*overrides, KEEP_TWO)
    more = (KEEP_TWO, "checkpoint.every_minutes=600", "hydra.run.dir=run")
    for jump in cases.some([-YEAR, YEAR], quick=1):
        cli = make_cli(tmp_path / f"{jump}")
        run = cli.folder / "run"
        process = driven(cli, "update", 4, *overrides, *more, number=f"FAULT_CLOCK={jump:+d}", env=faulty())
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        times = [json.loads(line)["time"][:4] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert times[0] != times[-1]  # it did jump
        ended_equal(whole, run)
        assert names_of(run / "checkpoints") == names_of(whole / "checkpoints")
        assert_told_without_negative_ages(cli)
        cases.done()
