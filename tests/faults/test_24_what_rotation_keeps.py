"""Rotation keeps the best wherever it lies, of equal ones the first, the newest, the resume's source, and strangers."""

from __future__ import annotations

import json
import math
import random
import shutil

import pytest

from runner.checkpoints.retention import RetentionPolicy
from runner.checkpoints.save_policy import SaveReason
from runner.checkpoints.store import CheckpointStore, step_name
from runner.runs.directory import RunDirectory
from runner.training.run_writer import RunWriter

pytestmark = [pytest.mark.fault(24), pytest.mark.slow]


def kept(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def status(run):
    return json.loads((run / "status.json").read_text())


def least(rows):
    """The step above 0 of the lowest validation loss."""
    return min((row["loss"], row["step"]) for row in rows if row["split"] == "valid" and row["step"] > 0)[1]


def assert_result_is(run, step):
    assert status(run)["result_step"] == step
    saved = (run / "checkpoints" / step_name(step) / "adapters.safetensors").read_bytes()
    assert (run / "adapters/adapters.safetensors").read_bytes() == saved


def test_the_best_stays_outside_the_last_ones_and_becomes_the_result(cli, rows):
    run = cli.folder / "run"
    overrides = ("train.iters=11", "train.eval_every=1", "checkpoint.every=1", "checkpoint.keep_last=2")
    for split, letter in (("train", "a"), ("valid", "b")):  # what is learned is wrong for what is validated
        (cli.folder / f"{split}.jsonl").write_text(json.dumps({"text": letter * 60}) + "\n")
    cli("model=tiny", "data=folder", "data.path=.", *overrides, "optimizer.learning_rate=0.01", "hydra.run.dir=run")
    best = least(rows(run))
    assert best < 10, "the run is to have its best outside the last two"
    assert kept(run) == [best, 10, 11] and status(run)["best"]["step"] == best
    assert_result_is(run, best)
    cli("resume=run", "train.iters=12")  # rotates once more, in another process
    best = least(rows(run))
    assert kept(run) == sorted({best, 11, 12}) and status(run)["best"]["step"] == best
    assert_result_is(run, best)


def test_of_equal_losses_the_first_is_the_best_and_stays(cli, rows):
    run = cli.folder / "run"
    overrides = ("train.iters=6", "train.eval_every=1", "checkpoint.every=1", "checkpoint.keep_last=1")
    cli("model=tiny", "data=tiny", *overrides, "optimizer.learning_rate=1e-30", "hydra.run.dir=run")
    assert len({row["loss"] for row in rows(run) if row["split"] == "valid"}) == 1
    assert kept(run) == [1, 6]
    assert_result_is(run, 1)


def test_the_checkpoint_that_a_process_resumed_from_stays_while_it_lives(cli, stopped):
    cli("resume=run", "checkpoint.every=1", "checkpoint.keep_last=1", "train.stop_at=7")
    assert kept(stopped) == [6, 7]
    cli("resume=run")
    assert kept(stopped) == [7, 8]  # and goes with the next, which came from another


@pytest.fixture
def strangers(cli, stopped, undisturbed, overrides, reseal):
    """Checkpoints of another run in the folder: higher than any of its own, and better by what they say."""
    other = undisturbed(*overrides)
    folders = []
    for step, name in ((8, "step-0000008"), (900, "step-0000900")):
        folders.append(shutil.copytree(other / "checkpoints/step-0000008", stopped / "checkpoints" / name))
        state = json.loads((folders[-1] / "train_state.json").read_text())
        (folders[-1] / "train_state.json").write_text(json.dumps(state | {"step": step}))
        reseal(folders[-1], step=step, metrics={"valid_loss": -1.0})
    return folders


def test_stale_higher_steps_of_another_run_are_neither_used_nor_removed_nor_best(
    cli, stopped, strangers, contents, undisturbed, overrides, ended_equal
):
    before = contents(strangers[1])
    out = cli("resume=run", "checkpoint.keep_last=1", "checkpoint.keep_best=1")
    assert "step-0000900: left by another run" in out and "step-0000006 at step 6" in out
    assert contents(strangers[1]) == before
    assert kept(stopped) == [6, 8, 900]  # its own step 8 took the place of the other's
    assert_result_is(stopped, 8)
    shutil.rmtree(strangers[1])
    ended_equal(undisturbed(*overrides), stopped)


def test_where_the_status_is_lost_too_nobody_guesses_whose_run_it_is(cli, stopped, strangers, contents):
    (stopped / "status.json").unlink()
    before = contents(stopped, but=(".lock",))
    out = cli("resume=run", expect=5)
    assert "checkpoints are of several runs" in out and "step-0000006 of " in out and "step-0000900 of " in out
    assert contents(stopped, but=(".lock",)) == before
    out = cli("resume=run/checkpoints/step-0000006", "hydra.run.dir=branch")
    assert "step-0000006 at step 6" in out


def test_whatever_comes_newest_best_source_and_strangers_survive_every_rotation(tmp_path, cases):
    """Random runs on a real disk: losses that tie or are NaN, unevaluated saves, resumes, replaced steps."""
    for case in range(cases.of(full=300, quick=15)):
        luck = random.Random(case)
        directory = RunDirectory(tmp_path / f"{case}")
        stranger = CheckpointStore(directory.checkpoints, "other").commit(luck.randrange(1, 60), {"a": b"other"})
        policy = RetentionPolicy(luck.randrange(3), luck.randrange(1, 3), luck.choice([None, None, 7]))
        store = CheckpointStore(directory.checkpoints, "own")
        record, step, ever = RunWriter(directory, store, policy), 0, {}
        for _ in range(luck.randrange(3, 9)):
            if ever and luck.random() < 0.3:  # another process goes on from the newest
                record = RunWriter(directory, store, policy)
                record.source_step = step
            step += luck.randrange(0 if ever else 1, 8)
            if step_name(step) == stranger.path.name:
                step += 1
            # The same step again has the same loss: a run is a function of its settings.
            loss = ever.setdefault(step, luck.choice([None, math.nan, math.inf, 1.0, 1.0, 2.0, 0.5]))
            reason = luck.choice([SaveReason.UPDATES, SaveReason.BEST, SaveReason.SIGTERM])
            store.commit(
                step, {"a": bytes([step])}, reasons=[reason], metrics={} if loss is None else {"valid_loss": loss}
            )
            store.rotate(set(record.retained_steps()))
            there = {found.step: found for found in store.checkpoints() if found.run_id == "own"}
            assert step in there
            assert record.source_step in (None, *there)
            finite = sorted((v, one) for one, v in ever.items() if v is not None and math.isfinite(v))
            if finite:
                assert finite[0][1] in there and record.result_step("best") == finite[0][1]
            else:
                assert record.result_step("best") == step
            assert all(store.load(found.path).files == {"a": bytes([one])} for one, found in there.items())
            assert store.load(stranger.path).files == {"a": b"other"}
        cases.done()
