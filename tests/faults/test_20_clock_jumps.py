"""The clock jumps by a year, between two starts or during a run: newest, rotation and result are the same."""

from __future__ import annotations

import json
import re

import pytest

pytestmark = [pytest.mark.fault(20), pytest.mark.slow]

YEAR = 31_536_000
KEEP_TWO = "checkpoint.keep_last=2"


def names_of(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_listed_without_negative_ages(cli):
    """Check the output of ls and show under the true clock."""
    for overrides in (("ls", "."), ("show", "run")):
        out = cli(*overrides)
        assert "run" in out and not re.search(r"(?<![\w.-])-\d", out), out
    (found,) = json.loads(cli("ls", ".", "--json"))["entries"]
    assert (found["state"], found["step"]) == ("finished", 8)


@pytest.mark.long
def test_a_run_resumed_a_year_ahead_and_then_a_year_back_ends_equal(
    cli, overrides, run_with_calls, fault_environment, newest_checkpoint, assert_ended_equal
):
    reference, _ = run_with_calls(*overrides, KEEP_TWO)
    run = cli.folder / "run"
    cli(*overrides, KEEP_TWO, "hydra.run.dir=run", "train.stop_at=3")
    for jump, stop, retained in ((YEAR, 5, {2, 4, 5}), (-YEAR, 7, {4, 6, 7}), (0, 8, {6, 8})):
        retained.add(newest_checkpoint(run).checkpoint.step)  # the source of a resume is retained
        cli("resume=run", f"train.stop_at={stop}", env=fault_environment(clock=f"{jump:+d}"))
        assert names_of(run / "checkpoints") == [f"step-{step:07d}" for step in sorted(retained)], jump
        assert newest_checkpoint(run).checkpoint.step == stop
    assert_ended_equal(reference, run)


def test_a_clock_that_jumps_during_a_run_changes_nothing(
    make_cli, tmp_path, overrides, driven, run_with_calls, fault_environment, assert_ended_equal, cases
):
    """In particular, it does not make a save due by checkpoint.every_minutes."""
    reference, _ = run_with_calls(*overrides, KEEP_TWO)
    more = (KEEP_TWO, "checkpoint.every_minutes=600", "hydra.run.dir=run")
    for jump in cases.some([-YEAR, YEAR], quick=1):
        cli = make_cli(tmp_path / f"{jump}")
        run = cli.folder / "run"
        process = driven(cli, "update", 4, *overrides, *more, number=f"FAULT_CLOCK={jump:+d}", env=fault_environment())
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        times = [json.loads(line)["time"][:4] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert times[0] != times[-1]  # the clock did jump
        assert_ended_equal(reference, run)
        assert names_of(run / "checkpoints") == names_of(reference / "checkpoints")
        assert_listed_without_negative_ages(cli)
        cases.done()
