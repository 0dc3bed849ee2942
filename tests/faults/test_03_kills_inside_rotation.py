"""SIGKILL at every system call of a rotation: what the policy keeps stays whole, leftovers go at the next start."""

from __future__ import annotations

import shutil

import pytest

from runner.checkpoints.store import CheckpointStore

pytestmark = [pytest.mark.fault(3), pytest.mark.slow]


@pytest.mark.parametrize("keep_last", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_killed_at_any_call_of_a_rotation_keeps_what_the_policy_keeps_and_ends_equal(
    make_cli, tmp_path, overrides, logged, faulty, newest, assert_same_state, ended_equal, cases, keep_last
):
    newest_step = 2 + 2 * keep_last  # its save is the first that lets one go, that of step 2
    # Where nothing is let go all are kept: each of the states that this run passes through can be compared with.
    every_state, _ = logged(*overrides, "checkpoint.keep_last=9")
    overrides = (*overrides, f"checkpoint.keep_last={keep_last}")
    whole, calls = logged(*overrides)
    calls = [(call, path) for call, path in calls if path.startswith("checkpoints")]
    victim = [i for i, (_, path) in enumerate(calls) if "step-0000002" in path]
    committed = [i for i, (call, path) in enumerate(calls) if call == "rename" and f"000{newest_step}-" in path]
    ending = victim[-1] + 1  # once it is gone
    assert ending - committed[0] > 10 and calls[victim[-1]][0] == "remove"
    for at in cases.some(range(committed[0] + 1, ending + 1), quick=1):
        cli = make_cli(tmp_path / f"{at}")
        run = cli.folder / "run"
        cli(*overrides, "hydra.run.dir=run", expect=-9, env=faulty(run / "checkpoints", at=at, do="kill"))
        found = newest(run)
        assert found.checkpoint.step == newest_step, calls[at]
        assert_same_state(found, every_state, but=("hyperparameters",))
        if keep_last == 2:
            kept = CheckpointStore(run / "checkpoints", found.checkpoint.run_id).load(
                run / f"checkpoints/step-000000{newest_step - 2}"
            )
            assert_same_state(kept, every_state, but=("hyperparameters",))
        cli("resume=run", f"train.stop_at={newest_step}")  # nothing is trained or saved: this is the next start
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert set(names) - {"step-0000002"} == {f"step-{step:07d}" for step in range(4, newest_step + 1, 2)}
        cli("resume=run")
        assert not (run / "checkpoints/step-0000002").exists()
        ended_equal(whole, run)
        shutil.rmtree(cli.folder)
        cases.done()
