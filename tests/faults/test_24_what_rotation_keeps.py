"""Rotation retains the best checkpoint (of equal ones the first), the newest, the source of a resume, and those of
another run."""

from __future__ import annotations

import json
import math
import random
import shutil

import pytest

from runner.checkpoints.retention import RetentionPolicy
from runner.checkpoints.run_retention import RunRetention
from runner.checkpoints.store import CheckpointStore, step_name
from runner.runs.directory import RunDirectory

pytestmark = [pytest.mark.fault(24), pytest.mark.slow]


def saved_steps(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def status(run):
    return json.loads((run / "status.json").read_text())


def best_step(rows):
    """Return the step above 0 of the lowest validation loss."""
    return min((row["loss"], row["step"]) for row in rows if row["split"] == "valid" and row["step"] > 0)[1]


def assert_result_is(run, step):
    assert status(run)["result_step"] == step
    saved = (run / "checkpoints" / step_name(step) / "adapters.safetensors").read_bytes()
    assert (run / "adapters/adapters.safetensors").read_bytes() == saved


def test_the_best_checkpoint_is_retained_and_becomes_the_result_although_it_is_not_among_the_last(cli, rows):
    run = cli.folder / "run"
    overrides = ("train.iters=11", "train.eval_every=1", "checkpoint.every=1", "checkpoint.keep_last=2")
    for split, letter in (("train", "a"), ("valid", "b")):  # training makes the validation loss worse
        (cli.folder / f"{split}.jsonl").write_text(json.dumps({"text": letter * 60}) + "\n")
    cli("model=tiny", "data=folder", "data.path=.", *overrides, "optimizer.learning_rate=0.01", "hydra.run.dir=run")
    best = best_step(rows(run))
    assert best < 10, "the best step must not be among the last two"
    assert saved_steps(run) == [best, 10, 11] and status(run)["best"]["step"] == best
    assert_result_is(run, best)
    cli("resume=run", "train.iters=12")  # rotates once more, in another process
    best = best_step(rows(run))
    assert saved_steps(run) == sorted({best, 11, 12}) and status(run)["best"]["step"] == best
    assert_result_is(run, best)


def test_of_equal_losses_the_first_is_the_best_and_is_retained(cli, rows):
    run = cli.folder / "run"
    overrides = ("train.iters=6", "train.eval_every=1", "checkpoint.every=1", "checkpoint.keep_last=1")
    cli("model=tiny", "data=tiny", *overrides, "optimizer.learning_rate=1e-30", "hydra.run.dir=run")
    assert len({row["loss"] for row in rows(run) if row["split"] == "valid"}) == 1
    assert saved_steps(run) == [1, 6]
    assert_result_is(run, 1)


def test_the_checkpoint_that_a_process_resumed_from_is_retained_while_it_runs(cli, stopped):
    cli("resume=run", "checkpoint.every=1", "checkpoint.keep_last=1", "train.stop_at=7")
    assert saved_steps(stopped) == [6, 7]
    cli("resume=run")
    assert saved_steps(stopped) == [7, 8]  # removed by the next process, which resumed from another


@pytest.fixture
def other_checkpoints(cli, stopped, undisturbed, overrides, reseal):
    """Checkpoints of another run in the folder: of higher steps than its own, with a lower loss in their manifests."""
    other = undisturbed(*overrides)
    folders = []
    for step, name in ((8, "step-0000008"), (900, "step-0000900")):
        folders.append(shutil.copytree(other / "checkpoints/step-0000008", stopped / "checkpoints" / name))
        state = json.loads((folders[-1] / "train_state.json").read_text())
        (folders[-1] / "train_state.json").write_text(json.dumps(state | {"step": step}))
        reseal(folders[-1], step=step, metrics={"valid_loss": -1.0})
    return folders


def test_higher_steps_of_another_run_are_neither_used_nor_removed_nor_the_best(
    cli, stopped, other_checkpoints, contents, undisturbed, overrides, assert_ended_equal
):
    before = contents(other_checkpoints[1])
    out = cli("resume=run", "checkpoint.keep_last=1", "checkpoint.keep_best=1")
    assert "step-0000900: left by another run" in out and "step-0000006 at step 6" in out
    assert contents(other_checkpoints[1]) == before
    assert saved_steps(stopped) == [6, 8, 900]  # its own step 8 replaced that of the other run
    assert_result_is(stopped, 8)
    shutil.rmtree(other_checkpoints[1])
    assert_ended_equal(undisturbed(*overrides), stopped)


def test_without_a_status_the_owner_of_checkpoints_of_two_runs_is_not_guessed(
    cli, stopped, other_checkpoints, contents
):
    (stopped / "status.json").unlink()
    before = contents(stopped, but=(".lock",))
    out = cli("resume=run", expect=5)
    assert "checkpoints are of several runs" in out and "step-0000006 of " in out and "step-0000900 of " in out
    assert contents(stopped, but=(".lock",)) == before
    out = cli("resume=run/checkpoints/step-0000006", "hydra.run.dir=branch")
    assert "step-0000006 at step 6" in out


def test_every_rotation_retains_the_newest_the_best_the_source_and_those_of_another_run(tmp_path, cases):
    """Random runs on a real disk: equal and non-finite losses, unevaluated saves, resumes, replaced steps."""
    for case in range(cases.of(full=300, quick=15)):
        rng = random.Random(case)
        directory = RunDirectory(tmp_path / f"{case}")
        other = CheckpointStore(directory.checkpoints, "other").commit(rng.randrange(1, 60), {"a": b"other"})
        policy = RetentionPolicy(rng.randrange(3), rng.randrange(1, 3), rng.choice([None, None, 7]))
        store = CheckpointStore(directory.checkpoints, "own")
        retention, step, losses = RunRetention(store, policy), 0, {}
        for _ in range(rng.randrange(3, 9)):
            if losses and rng.random() < 0.3:  # another process resumes from the newest
                retention = RunRetention(store, policy, source_step=step)
            step += rng.randrange(0 if losses else 1, 8)
            if step_name(step) == other.path.name:
                step += 1
            # The same step again has the same loss: a run is a function of its settings.
            loss = losses.setdefault(step, rng.choice([None, math.nan, math.inf, 1.0, 1.0, 2.0, 0.5]))
            reason = rng.choice(["every 10 updates", "best", "SIGTERM"])
            store.commit(
                step, {"a": bytes([step])}, save_reasons=[reason], metrics={} if loss is None else {"valid_loss": loss}
            )
            store.rotate(set(retention.retained_steps()))
            there = {found.step: found for found in store.checkpoints() if found.manifest.run_id == "own"}
            assert step in there
            assert retention.source_step in (None, *there)
            finite = sorted((v, one) for one, v in losses.items() if v is not None and math.isfinite(v))
            if finite:
                assert finite[0][1] in there and retention.result_step("best") == finite[0][1]
            else:
                assert retention.result_step("best") == step
            assert all(store.load(found.path).files == {"a": bytes([one])} for one, found in there.items())
            assert store.load(other.path).files == {"a": b"other"}
        cases.done()
