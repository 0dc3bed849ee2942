"""A loss, gradient, weight or metric that is not finite stops the run, is never the best, and keeps what was finite."""

from __future__ import annotations

import json

import pytest

from runner.checkpoints.retention import RetentionPolicy, RetentionReason
from runner.checkpoints.run_retention import RunRetention
from runner.checkpoints.safetensors_file import unpack
from runner.checkpoints.store import CheckpointStore
from runner.runs.rows import read_rows
from runner.training import state_files

pytestmark = [pytest.mark.fault(15), pytest.mark.slow]

OVERRIDES = (
    "model=tiny",
    "data=tiny",
    "train.iters=20",
    "train.report_every=1",
    "checkpoint.every=1",
    "hydra.run.dir=run",
)
# The loss overflows at once.
TOO_FAST = ("optimizer.learning_rate=1e30",)
# A warmup that exceeds the largest float32 at update 4, with gradients too small to change anything before it:
# losses and gradients stay finite, and the weights overflow first.
OVERFLOW = (
    "optimizer=adam",
    "optimizer.learning_rate=1e39",
    "optimizer.bias_correction=false",
    "optimizer.eps=1e8",
    "schedule.warmup=10",
    "lora.scale=1e-30",
)


def read_status(run):
    return json.loads((run / "status.json").read_text())


def saved_steps(run):
    """Return the steps of the checkpoints; each of them has to verify and to be finite."""
    store = CheckpointStore(run / "checkpoints", read_status(run)["run_id"])
    return [state_files.read_state(store.load(found.path)).progress.step for found in store.checkpoints()]


def assert_diverged(run, out, message):
    status = read_status(run)
    assert status["state"] == "diverged" and message in status["reason"] and message in out
    assert "Traceback" not in out and not (run / "adapters").exists()
    assert all(json.dumps(row, allow_nan=False) for row in read_rows(run / "metrics.jsonl"))


def test_a_non_finite_loss_stops_the_run_before_the_update(cli):
    run = cli.folder / "run"
    out = cli(*OVERRIDES, *TOO_FAST, "train.eval_every=100", "checkpoint.keep_last=1", expect=4)
    assert_diverged(run, out, "at update 2 is not finite")
    assert saved_steps(run) == [1] and read_status(run)["step"] == 1 and "best" not in read_status(run)
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [0, 1]
    before = (run / "checkpoints/step-0000001/adapters.safetensors").read_bytes()
    out = cli("resume=run", expect=4)
    assert_diverged(run, out, "at update 2 is not finite")
    assert (run / "checkpoints/step-0000001/adapters.safetensors").read_bytes() == before


def test_a_non_finite_validation_loss_is_never_the_best_and_not_saved(cli):
    run = cli.folder / "run"
    out = cli(*OVERRIDES, *TOO_FAST, "train.eval_every=1", expect=4)
    assert_diverged(run, out, "validation loss at step 1 is not finite")
    assert saved_steps(run) == [] and "best" not in read_status(run)


def test_non_finite_weights_are_not_saved_and_replace_no_checkpoint(cli):
    run = cli.folder / "run"
    out = cli(
        *OVERRIDES, *OVERFLOW, "train.eval_every=100", "checkpoint.keep_last=1", "checkpoint.keep_best=0", expect=4
    )
    assert_diverged(run, out, "not finite after update 4")
    assert saved_steps(run) == [3] and read_status(run)["last_checkpoint"] == 3


def test_the_best_checkpoint_before_the_divergence_can_be_exported(cli):
    run = cli.folder / "run"
    out = cli(*OVERRIDES, *OVERFLOW, "train.eval_every=1", "checkpoint.keep_last=1", expect=4)
    assert_diverged(run, out, "validation loss at step 4 is not finite")
    best = read_status(run)["best"]
    assert best["step"] == 1 and saved_steps(run) == [1, 3]
    cli("export", "run", "--checkpoint", "best", "--to", "mlx", "--out", "out")
    tensors, _ = unpack((cli.folder / "out/adapters.safetensors").read_bytes(), where="out")
    assert all(tensor.is_finite() for tensor in tensors.values())


def test_without_a_validation_set_non_finite_weights_do_not_become_the_result(cli):
    (cli.folder / "data").mkdir()
    (cli.folder / "data/train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    overrides = (*OVERRIDES, "data.path=data", "optimizer.learning_rate=1e39", "train.iters=1")
    out = cli(*overrides, expect=4)
    assert_diverged(cli.folder / "run", out, "not finite after update 1")
    assert saved_steps(cli.folder / "run") == []


@pytest.mark.parametrize("unmeasured", [2, 4, 6])
def test_a_checkpoint_without_a_finite_metric_is_never_the_best(stopped, reseal, unmeasured):
    for step in (2, 4, 6):
        metric = None if step == unmeasured else 9.0 - step
        reseal(stopped / f"checkpoints/step-{step:07d}", metrics={"valid_loss": metric})
    store = CheckpointStore(stopped / "checkpoints", read_status(stopped)["run_id"])
    retention = RunRetention(store, RetentionPolicy(keep_last=0, keep_best=3))
    best = 4 if unmeasured == 6 else 6
    assert retention.result_step("best") == best
    ranked = {step for step, reasons in retention.retained_steps().items() if RetentionReason.BEST in reasons}
    assert ranked == {2, 4, 6} - {unmeasured}


def test_a_checkpoint_without_a_finite_metric_is_not_the_result_of_the_resumed_run(cli, stopped, reseal):
    for step in (4, 6):
        reseal(stopped / f"checkpoints/step-{step:07d}", metrics={"valid_loss": None})
    cli("resume=run")
    assert read_status(stopped)["result_step"] == 8
    last = (stopped / "checkpoints/step-0000008/adapters.safetensors").read_bytes()
    assert (stopped / "adapters/adapters.safetensors").read_bytes() == last
