"""SIGKILL at every system call of a rotation: retained checkpoints stay whole, the next start removes leftovers."""

from __future__ import annotations

import shutil

import pytest

from runner.checkpoints.store import CheckpointStore

pytestmark = [pytest.mark.fault(3), pytest.mark.slow]


@pytest.mark.parametrize("keep_last", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_killed_inside_a_rotation_keeps_its_retained_checkpoints_and_ends_equal(
    make_cli,
    tmp_path,
    overrides,
    run_with_calls,
    fault_environment,
    newest_checkpoint,
    assert_same_state,
    assert_ended_equal,
    cases,
    keep_last,
):
    newest_step = 2 + 2 * keep_last  # its rotation is the first that removes a checkpoint, that of step 2
    # A run that retains all checkpoints, to compare each state with.
    reference, _ = run_with_calls(*overrides, "checkpoint.keep_last=9")
    overrides = (*overrides, f"checkpoint.keep_last={keep_last}")
    whole, calls = run_with_calls(*overrides)
    calls = [(call, path) for call, path in calls if path.startswith("checkpoints")]
    victim = [i for i, (_, path) in enumerate(calls) if "step-0000002" in path]
    committed = [i for i, (call, path) in enumerate(calls) if call == "rename" and f"000{newest_step}-" in path]
    end = victim[-1] + 1  # the checkpoint is removed
    assert end - committed[0] > 10 and calls[victim[-1]][0] == "remove"
    for at in cases.some(range(committed[0] + 1, end + 1), quick=1):
        cli = make_cli(tmp_path / f"{at}")
        run = cli.folder / "run"
        cli(*overrides, "hydra.run.dir=run", expect=-9, env=fault_environment(run / "checkpoints", at=at, do="kill"))
        found = newest_checkpoint(run)
        assert found.checkpoint.step == newest_step, calls[at]
        assert_same_state(found, reference, but=("hyperparameters",))
        if keep_last == 2:
            previous = CheckpointStore(run / "checkpoints", found.checkpoint.manifest.run_id).load(
                run / f"checkpoints/step-000000{newest_step - 2}"
            )
            assert_same_state(previous, reference, but=("hyperparameters",))
        cli("resume=run", f"train.stop_at={newest_step}")  # the next start, without training or saving
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert set(names) - {"step-0000002"} == {f"step-{step:07d}" for step in range(4, newest_step + 1, 2)}
        cli("resume=run")
        assert not (run / "checkpoints/step-0000002").exists()
        assert_ended_equal(whole, run)
        shutil.rmtree(cli.folder)
        cases.done()
