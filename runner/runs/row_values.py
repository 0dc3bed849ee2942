"""What a run reached on each row that it was evaluated on: losses from row_losses.jsonl, scores from samples.jsonl."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from runner.common import layout
from runner.common.safe_json import finite_number, is_count
from runner.runs.inspect import RunInfo
from runner.runs.row_losses import MAX_ROWS, has_too_many_rows, read_row_losses
from runner.runs.rows import read_rows

ROW_METRICS = ("valid_loss", "test_loss", "score")
"""The metrics that are means over rows whose values a run keeps."""


@dataclass(frozen=True)
class RowValues:
    """One value a row, of which the metric is the mean: sum(values) / sum(weights)."""

    step: int
    """The evaluation that they are of."""
    rows: str
    """Identifies the rows: runs with the same one were evaluated on the same rows."""
    values: np.ndarray
    """(rows,) float64: sum over the supervised tokens of each row; or its score."""
    weights: np.ndarray
    """(rows,) float64: supervised tokens of each row; or 1."""


class NoRowValues(Exception):
    """Raised where a run has no values of rows; the message says why, such as "no evaluation yet"."""


def row_values(run: RunInfo, metric: str) -> RowValues:
    """Return the values of the run's best evaluation (valid_loss), or of its result (test_loss, score).

    `metric` is one of `ROW_METRICS`.

    Raises:
        NoRowValues: why there are none.
    """
    if metric == "score":
        return _scores(run)
    split, step = ("test", None) if metric == "test_loss" else ("valid", run.best_step)
    if split == "valid" and step is None:
        raise NoRowValues("no evaluation yet")
    path = run.path / layout.ROW_LOSSES
    found = read_row_losses(path, split, step)
    if found is not None:
        return RowValues(found.step, f"{found.rows} {len(found.losses)}", found.losses, found.tokens)
    if not path.is_file():
        raise NoRowValues(f"no {layout.ROW_LOSSES}: it was removed, or the run is of an earlier version")
    if has_too_many_rows(path, split, step):
        raise NoRowValues(f"evaluated on more than {MAX_ROWS:,} rows, of which no losses are kept")
    raise NoRowValues(f"no losses of the {split} rows" + ("" if step is None else f" at step {step}"))


def _scores(run: RunInfo) -> RowValues:
    """Return the scores of the last answers after training."""
    answers: dict[int, dict[int, dict[str, Any]]] = {}
    for sample in read_rows(run.path / layout.SAMPLES):
        if is_count(sample.get("row")) and finite_number(sample.get("score")) is not None:
            answers.setdefault(sample["step"], {})[sample["row"]] = sample
    step = max(answers, default=0)
    if step == 0:
        raise NoRowValues("no scored answers after training")
    rows = sorted(answers[step])
    questions = [[row, answers[step][row].get("prompt"), answers[step][row].get("expected")] for row in rows]
    text = json.dumps([run.settings.get("data.metric"), run.settings.get("data.metric_split"), questions])
    scores = np.array([answers[step][row]["score"] for row in rows], np.float64)
    return RowValues(step, hashlib.sha256(text.encode()).hexdigest(), scores, np.ones(len(rows)))
