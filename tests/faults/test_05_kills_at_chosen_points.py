"""Three kills in one run; a kill inside accumulation, at an epoch's edge, during an evaluation: Equal."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.fault(5), pytest.mark.slow]

# 50 rows in batches of 4 make 13 batches an epoch: with 3 an update, update 5 lies over the edge.
WORDS = (
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
    cli(*WORDS)
    return cli.folder / "run"


KILLS = {
    "three kills": [("update", 6), ("update", 3), ("micro-batch", 20)],
    "inside accumulation": [("micro-batch", 3 * 6 + 2)],
    "at an epoch's edge": [("micro-batch", 13), ("micro-batch", 2)],
    "during evaluation": [("evaluation", 5)],
    "before the first save": [("update", 2)],
    "as a save begins": [("save", 2)],
}
MORE = ("inside accumulation", "before the first save", "as a save begins")
"""Left to `make faults`: rows 1 and 2 kill at such points as well."""


@pytest.mark.parametrize(
    "kills",
    [pytest.param(points, id=name, marks=[pytest.mark.long] if name in MORE else []) for name, points in KILLS.items()],
)
def test_equal_after(cli, driven, whole, assert_equal_runs, kills):
    arguments = WORDS
    for point, at in kills:
        process = driven(cli, point, at, *arguments)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == -9, out
        arguments = ("resume=run",)
    cli("resume=run")
    assert_equal_runs(whole, cli.folder / "run")
