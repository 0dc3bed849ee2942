"""A loss, a gradient, a weight or a metric that is not finite: told by its step, never best; what was finite stays."""

from __future__ import annotations

import json

import pytest

from runner.checkpoints.retention import RetentionPolicy
from runner.checkpoints.safetensors_file import unpack
from runner.checkpoints.store import CheckpointStore
from runner.runs.directory import RunDirectory
from runner.runs.rows import read_rows
from runner.training import state_files
from runner.training.run_writer import RunWriter

pytestmark = [pytest.mark.fault(15), pytest.mark.slow]

WORDS = ("model=tiny", "data=tiny", "train.iters=20", "train.report_every=1", "checkpoint.every=1", "hydra.run.dir=run")
# The loss overflows at once.
TOO_FAST = ("optimizer.learning_rate=1e30",)
# A warmup that passes the largest float32 at update 4, while the gradients are too small to move anything before it:
# losses and gradients stay finite, and the weights are the first that are not.
OVERFLOW = (
    "optimizer=adam",
    "optimizer.learning_rate=1e39",
    "optimizer.bias_correction=false",
    "optimizer.eps=1e8",
    "schedule.warmup=10",
    "lora.scale=1e-30",
)


def told(run):
    return json.loads((run / "status.json").read_text())


def saved(run):
    """The steps of the checkpoints, each of which verifies and holds finite numbers only."""
    store = CheckpointStore(run / "checkpoints", told(run)["run_id"])
    return [state_files.read_state(store.load(found.path)).progress.step for found in store.checkpoints()]


def assert_diverged(run, out, message):
    status = told(run)
    assert status["state"] == "diverged" and message in status["reason"] and message in out
    assert "Traceback" not in out and not (run / "adapters").exists()
    assert all(json.dumps(row, allow_nan=False) for row in read_rows(run / "metrics.jsonl"))


def test_a_loss_that_is_not_finite_stops_before_the_update_and_the_state_before_it_stays(cli):
    run = cli.folder / "run"
    out = cli(*WORDS, *TOO_FAST, "train.eval_every=100", "checkpoint.keep_last=1", expect=4)
    assert_diverged(run, out, "at update 2 is not finite")
    assert saved(run) == [1] and told(run)["step"] == 1 and "best" not in told(run)
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [0, 1]
    before = (run / "checkpoints/step-0000001/adapters.safetensors").read_bytes()
    out = cli("resume=run", expect=4)
    assert_diverged(run, out, "at update 2 is not finite")
    assert (run / "checkpoints/step-0000001/adapters.safetensors").read_bytes() == before


def test_a_validation_loss_that_is_not_finite_is_never_the_best_and_is_not_saved(cli):
    run = cli.folder / "run"
    out = cli(*WORDS, *TOO_FAST, "train.eval_every=1", expect=4)
    assert_diverged(run, out, "validation loss at step 1 is not finite")
    assert saved(run) == [] and "best" not in told(run)


def test_weights_that_are_not_finite_are_not_saved_and_do_not_push_out_the_last_that_are(cli):
    run = cli.folder / "run"
    out = cli(*WORDS, *OVERFLOW, "train.eval_every=100", "checkpoint.keep_last=1", "checkpoint.keep_best=0", expect=4)
    assert_diverged(run, out, "not finite after update 4")
    assert saved(run) == [3] and told(run)["last_checkpoint"] == 3


def test_the_best_before_it_stays_and_can_be_exported(cli):
    run = cli.folder / "run"
    out = cli(*WORDS, *OVERFLOW, "train.eval_every=1", "checkpoint.keep_last=1", expect=4)
    assert_diverged(run, out, "validation loss at step 4 is not finite")
    best = told(run)["best"]
    assert best["step"] == 1 and saved(run) == [1, 3]
    cli("export", "run", "--checkpoint", "best", "--to", "mlx", "--out", "out")
    tensors, _ = unpack((cli.folder / "out/adapters.safetensors").read_bytes(), where="out")
    assert all(tensor.is_finite() for tensor in tensors.values())


def test_without_a_validation_set_no_result_is_made_of_them(cli):
    (cli.folder / "data").mkdir()
    (cli.folder / "data/train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    overrides = (*WORDS, "data.path=data", "optimizer.learning_rate=1e39", "train.iters=1")
    out = cli(*overrides, expect=4)
    assert_diverged(cli.folder / "run", out, "not finite after update 1")
    assert saved(cli.folder / "run") == []


@pytest.mark.parametrize("unmeasured", [2, 4, 6])
def test_a_metric_that_is_nan_in_a_checkpoint_never_wins(stopped, reseal, unmeasured):
    for step in (2, 4, 6):
        metric = None if step == unmeasured else 9.0 - step
        reseal(stopped / f"checkpoints/step-{step:07d}", metrics={"valid_loss": metric})
    store = CheckpointStore(stopped / "checkpoints", told(stopped)["run_id"])
    record = RunWriter(RunDirectory(stopped), store, RetentionPolicy(keep_last=0, keep_best=3))
    best = 4 if unmeasured == 6 else 6
    assert record.result_step("best") == best
    ranked = {step for step, why in record.retained_steps().items() if "best" in why}
    assert ranked == {2, 4, 6} - {unmeasured}


def test_a_metric_that_is_nan_in_a_checkpoint_is_not_the_result_of_the_run_that_goes_on(cli, stopped, reseal):
    for step in (4, 6):
        reseal(stopped / f"checkpoints/step-{step:07d}", metrics={"valid_loss": None})
    cli("resume=run")
    assert told(stopped)["result_step"] == 8
    last = (stopped / "checkpoints/step-0000008/adapters.safetensors").read_bytes()
    assert (stopped / "adapters/adapters.safetensors").read_bytes() == last
