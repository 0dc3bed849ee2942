"""With train.on_nonfinite=skip, an update whose loss is not finite is not applied, and everything else goes on."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from runner.common.errors import Diverged
from runner.reports.run_page import print_run_page, read_run_page
from runner.reports.screen import Screen
from runner.runs.inspect import read_run
from runner.training.train_step import TrainStep

SMALL = {"train.iters": 8, "train.report_every": 2, "checkpoint.every": 2, "train.eval_batches": 1}
SKIP = SMALL | {"train.on_nonfinite": "skip", "train.nonfinite_limit": 3}


@pytest.fixture
def poison(monkeypatch):
    """`poison(3, 4)`: the batches of updates 3 and 4 have a weight that is NaN, and so has their loss."""
    original = TrainStep.update

    def set_updates(*updates):
        def update(self, state, batches, learning_rate):
            if state.progress.step + 1 in updates:
                weights = batches[0].batch.weights * np.float32("nan")
                batches = [dataclasses.replace(b, batch=dataclasses.replace(b.batch, weights=weights)) for b in batches]
            return original(self, state, batches, learning_rate)

        monkeypatch.setattr(TrainStep, "update", update)

    return set_updates


def adapter(run, step):
    return (run / f"checkpoints/step-{step:07d}/adapters.safetensors").read_bytes()


def test_a_skipped_update_leaves_weights_and_optimizer_and_is_counted(tiny, train, tmp_path, poison, rows, capsys):
    poison(3, 4, 6)
    run = train(tiny(**SKIP, **{"checkpoint.keep_last": 9}), tmp_path / "run")
    assert adapter(run, 2) == adapter(run, 4) != adapter(run, 6)
    optimizers = [(run / f"checkpoints/step-000000{n}/optimizer.safetensors").read_bytes() for n in (2, 4)]
    assert optimizers[0] == optimizers[1]
    # No update was made in 3 and 4, so that there is no loss to report at 4.
    trained = [(row["step"], row["skipped_updates"]) for row in rows(run) if row["split"] == "train"]
    assert trained == [(2, 0), (6, 3), (8, 3)]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["skipped_updates"]) == ("finished", 8, 3)
    log = (run / "run.log").read_text()
    assert log.count("the update was not applied. Skipped so far: ") == 3
    skipped = "3 updates, whose loss or gradient was not finite"
    assert f"skipped: {skipped}" in (run / "report.html").read_text()
    print_run_page(read_run_page(read_run(run)), Screen())
    assert re.search(rf"skipped +{skipped}", capsys.readouterr().out)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resume_among_skipped_updates_ends_equal(tiny, train, tmp_path, poison, assert_equal_runs, stop):
    poison(4, 5)
    whole = train(tiny(**SKIP), tmp_path / "whole")
    run = train(tiny(**SKIP), tmp_path / "run", stop_at=stop)
    train(tiny(**SKIP), run, resume=run)
    assert_equal_runs(whole, run)
    statuses = [json.loads((folder / "status.json").read_text()) for folder in (whole, run)]
    assert statuses[0]["skipped_updates"] == statuses[1]["skipped_updates"] == 2


def test_one_more_than_the_limit_in_a_row_ends_the_run_as_diverged(tiny, train, tmp_path, poison):
    poison(1, 2, 3, 5, 6, 7, 8)
    with pytest.raises(Diverged, match=r"loss at update 8 is not finite.* 3 updates in a row had been skipped"):
        train(tiny(**SKIP), tmp_path / "run")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["skipped_updates"]) == ("diverged", 6)


def test_a_diverged_run_resumes_with_skip_and_its_rows_had_no_count(tiny, train, tmp_path, poison, rows):
    poison(3)
    with pytest.raises(Diverged, match="loss at update 3 is not finite"):
        train(tiny(**SMALL), tmp_path / "run")
    run = train(tiny(**SKIP), tmp_path / "run", resume=tmp_path / "run")
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    trained = [(row["step"], row.get("skipped_updates")) for row in rows(run) if row["split"] == "train"]
    assert trained == [(2, None), (4, 1), (6, 1), (8, 1)]
