"""SmolLM2 in processes of its own: a first run with answers before and after, and a resume after a kill."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import system

SHORT = (
    "experiment=first_run",
    "train.iters=4",
    "train.batch_size=2",
    "train.report_every=1",
    "train.eval_every=2",
    "train.eval_batches=1",
    "schedule.warmup=1",
    "lora.num_layers=2",
    "lora.dropout=0.1",
    "checkpoint.every=2",
    "data.metric_rows=2",
    "data.max_new_tokens=4",
    "hydra.run.dir=run",
)


@pytest.mark.skipif(system.SIMULATED, reason="simulated: an update on a quantized base takes minutes")
@pytest.mark.slow
def test_a_first_run_shows_answers_and_a_killed_one_resumes_and_ends_equal(
    cli, make_cli, tmp_path, assert_equal_runs, rows
):
    whole = make_cli(tmp_path / "whole")
    out = whole(*SHORT)
    assert "execution_accuracy on 2 held-out rows" in out and "before" in out and "after" in out
    losses = [r["loss"] for r in rows(whole.folder / "run") if r["split"] == "valid"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    process = cli.start(*SHORT)
    while not list((cli.folder / "run/checkpoints").glob("step-*2")) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.4)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert json.loads((cli.folder / "run/status.json").read_text())["state"] in ("running", "finished")
    cli("resume=run")
    assert_equal_runs(whole.folder / "run", cli.folder / "run")
