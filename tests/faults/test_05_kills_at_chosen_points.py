"""A run killed several times, or at a chosen point, resumes and ends equal."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.fault(5), pytest.mark.slow]

# 50 rows in batches of 4 are 13 batches per epoch: with 3 per update, update 5 spans the end of the epoch.
OVERRIDES = (
    "model=tiny",
    "data=tiny",
    "schedule=cosine",
    "lora.dropout=0.2",
    "optimizer.learning_rate=1e-3",
    "train.iters=14",
    "train.grad_accumulation=3",
    "train.report_every=4",
    "train.eval_every=5",
    "train.eval_tokens=1",  # several batches in an evaluation
    "train.cache_baseline=false",  # and one before the first update in each run
    "checkpoint.every=4",
    "hydra.run.dir=run",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, make_cli):
    cli = make_cli(tmp_path_factory.mktemp("whole"))
    cli(*OVERRIDES)
    return cli.folder / "run"


KILLS = {
    "three kills": [("update", 6), ("update", 3), ("micro-batch", 20)],
    "inside accumulation": [("micro-batch", 3 * 6 + 2)],
    "at the end of an epoch": [("micro-batch", 13), ("micro-batch", 2)],
    "during evaluation": [("evaluation", 5)],
    "before the first save": [("update", 2)],
    "as a save begins": [("save", 2)],
}
LONG = ("inside accumulation", "before the first save", "as a save begins")
"""Run by `make faults` only: rows 1 and 2 kill at such points as well."""


@pytest.mark.parametrize(
    "kills",
    [pytest.param(points, id=name, marks=[pytest.mark.long] if name in LONG else []) for name, points in KILLS.items()],
)
def test_a_run_resumes_and_ends_equal_after(cli, driven, whole, assert_equal_runs, kills):
    arguments = OVERRIDES
    for point, at in kills:
        process = driven(cli, point, at, *arguments)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == -9, out
        arguments = ("resume=run",)
    cli("resume=run")
    assert_equal_runs(whole, cli.folder / "run")
