"""An evaluation records the loss of each row in the order of the data, however its rows are batched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "row_losses.jsonl").read_text().splitlines()]


def test_rows_keep_their_losses_in_other_batches(tiny: Callable, train: Callable, tmp_path: Path) -> None:
    settings = {"train.iters": 2, "train.eval_every": 2, "train.cache_baseline": False}
    together = train(tiny(**settings, **{"train.eval_tokens": 100_000}), tmp_path / "together")
    apart = train(tiny(**settings, **{"train.eval_tokens": 1}), tmp_path / "apart")
    for one, other in zip(evaluations(together), evaluations(apart), strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=1e-4)
        assert {**one, "losses": 0} == {**other, "losses": 0}
    some = train(tiny(**settings, **{"train.eval_batches": 1}), tmp_path / "some")
    all_rows, few_rows = evaluations(apart)[0], evaluations(some)[0]
    assert all_rows["rows"] != few_rows["rows"]
    pairs = list(zip(all_rows["tokens"], all_rows["losses"], strict=True))
    found = [
        next(i for i, pair in enumerate(pairs) if pair[0] == tokens and pair[1] == pytest.approx(loss, rel=1e-4))
        for tokens, loss in zip(few_rows["tokens"], few_rows["losses"], strict=True)
    ]
    assert len(found) == 4 and found == sorted(found)


def test_the_test_split_is_recorded_and_a_run_without_evaluations_has_no_file(
    tiny: Callable, train: Callable, tmp_path: Path
) -> None:
    run = train(tiny(**{"train.iters": 2, "train.eval_every": 2, "train.test": True}), tmp_path / "tested")
    assert [(line["step"], line["split"]) for line in evaluations(run)] == [(0, "valid"), (2, "valid"), (2, "test")]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if row["split"] in ("valid", "test")]
    tokens = [evaluations(run)[i]["tokens"] for i in (0, 0, 2)]
    for evaluation, counts, loss in zip(evaluations(run), tokens, losses, strict=True):
        assert sum(evaluation["losses"]) / sum(counts) == pytest.approx(loss, rel=1e-5)
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    without = train(tiny(**{"train.iters": 1, "data.path": str(data)}), tmp_path / "without")
    assert not (without / "row_losses.jsonl").exists()
