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


ADAPTERS = {
    "dora": (
        "lora.type=dora",
        "lora.keys=[q_proj,layers.0-1.mlp.*,embed_tokens]",
        "lora.rank_pattern=[mlp.*:2]",
        "lora.b_lr_ratio=4",
    ),
    "pissa": ("lora.init=pissa", "lora.dropout=0.1", "lora.modules_to_save=[norm]"),
    "full": ("lora.type=full", "lora.num_layers=2", "optimizer.weight_decay=0.1"),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_run_of_each_kind_of_adapter_ends_equal_after_a_kill(cli, driven, assert_equal_runs, adapter):
    run = ("model=tiny", "data=tiny", "optimizer.learning_rate=1e-3", "train.iters=5", "checkpoint.every=2")
    run += ("train.eval_every=4", "train.report_every=2", *ADAPTERS[adapter])
    cli(*run, "hydra.run.dir=whole")
    process = driven(cli, "update", 4, *run, "hydra.run.dir=run")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == -9, out
    cli("resume=run")
    assert_equal_runs(cli.folder / "whole", cli.folder / "run")


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
