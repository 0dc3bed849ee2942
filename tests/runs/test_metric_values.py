"""The value of each metric by which runs are ranked, from the rows of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.config import schema
from runner.runs.inspect import read_run
from runner.runs.metric_values import metric_value
from runner.runs.objective import Objective
from runner.runs.rows import read_rows


def train(step: int, tokens: int, rate: float, memory: float) -> dict:
    fields = {"tokens": tokens, "tokens_per_second": rate, "peak_memory_gb": memory}
    return {"step": step, "split": "train", "loss": 1.0, **fields}


ROWS = [
    {"step": 0, "split": "valid", "loss": 0.1, "reward_accuracy": 0.9},
    train(4, 400, 100.0, 3.0),
    {"step": 4, "split": "valid", "loss": 0.5, "reward_accuracy": 0.7, "peak_memory_gb": 3.5},
    train(8, 1200, 50.0, 2.0),
    {"step": 8, "split": "valid", "loss": 0.6, "reward_accuracy": 0.8, "tokens_per_second": 9000.0},
    {"step": 8, "split": "test", "loss": 2.0},
]


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("valid_loss", 0.25),
        ("test_loss", 2.0),
        ("score", None),
        ("reward_accuracy", 0.7),  # of the checkpoint with the lowest loss after training began
        ("tokens_per_second", 1200 / 20),  # 4 s and 16 s
        ("peak_memory_gb", 3.5),
        ("of_a_later_version", None),
    ],
)
def test_each_metric_has_one_definition(metric: str, value: float | None) -> None:
    assert metric_value(ROWS, 0.25, metric) == value
    assert metric_value([], None, metric) is None


def test_a_real_run_has_a_value_of_each_metric_that_its_config_measures(train_once, tiny, tmp_path: Path) -> None:
    config = tiny(**{"train.test": True, "train.iters": 2, "train.report_every": 1, "train.eval_every": 1})
    run = read_run(train_once(config, tmp_path / "run"))
    values = {metric: Objective(metric).value(run) for metric in schema.OBJECTIVE_METRICS}
    assert values.pop("score") is None and values.pop("reward_accuracy") is None
    assert all(value is not None and value > 0 for value in values.values()), values
    rows = [row for row in read_rows(run.path / "metrics.jsonl") if row["split"] == "train"]
    before = [0, *(row["tokens"] for row in rows)]
    seconds = [(row["tokens"] - before[i]) / row["tokens_per_second"] for i, row in enumerate(rows)]
    assert values["tokens_per_second"] == pytest.approx(rows[-1]["tokens"] / sum(seconds), rel=1e-3)
