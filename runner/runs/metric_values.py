"""The value that a run has of each metric by which runs are ranked, from the rows of its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runner.common.safe_json import finite_number
from runner.runs.timeline import Timeline

VALID_LOSS = "valid_loss"
Rows = Sequence[Mapping[str, Any]]


def metric_value(rows: Rows, best_loss: float | None, metric: str) -> float | None:
    """Return the value of `metric`, one of `schema.OBJECTIVE_METRICS`; None where the rows have none.

    Args:
        rows: the rows of metrics.jsonl; not needed for valid_loss.
        best_loss: the lowest validation loss.
    """
    if metric == VALID_LOSS:
        return best_loss
    return _VALUES[metric](rows) if metric in _VALUES else None


def tokens_per_second(rows: Rows) -> float | None:
    """Return all tokens trained on by the time in updates: the mean of the rows' rates, weighted by their time.

    Evaluation, saving and interruptions do not count.
    """
    timeline = Timeline.of(rows)
    seconds = timeline.seconds[-1][1]
    return timeline.tokens_reported / seconds if seconds > 0 else None


def peak_memory_gb(rows: Rows) -> float | None:
    """Return the highest peak of memory in any row."""
    return max((gb for row in rows if (gb := finite_number(row.get("peak_memory_gb"))) is not None), default=None)


def _test_loss(rows: Rows) -> float | None:
    return _last(finite_number(row.get("loss")) for row in rows if row.get("split") == "test")


def _score(rows: Rows) -> float | None:
    return _last(finite_number(row.get("score")) for row in rows if row.get("step"))


def _reward_accuracy(rows: Rows) -> float | None:
    """Return that of the evaluation with the lowest loss, whose checkpoint is the result."""
    found = [
        (loss, accuracy)
        for row in rows
        if row.get("split") == "valid"
        and row.get("step")
        and (loss := finite_number(row.get("loss"))) is not None
        and (accuracy := finite_number(row.get("reward_accuracy"))) is not None
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _last(values: Any) -> float | None:
    return next((value for value in reversed(list(values)) if value is not None), None)


_VALUES: Mapping[str, Callable[[Rows], float | None]] = {
    "test_loss": _test_loss,
    "score": _score,
    "reward_accuracy": _reward_accuracy,
    "tokens_per_second": tokens_per_second,
    "peak_memory_gb": peak_memory_gb,
}
