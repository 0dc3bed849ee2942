"""Metrics that score generated answers row by row, chosen by `data.metric`.

A metric is a small class with a ``name`` and a ``score``, registered in `METRICS` under its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from runner.data.metrics.exact_match import ExactMatch
from runner.data.metrics.execution import ExecutionAccuracy


class Metric(Protocol):
    """Scores one generated text against its row."""

    name: str

    def score(self, row: Mapping[str, Any], text: str) -> float:
        """Return 1.0 for a correct answer, 0.0 for a wrong one.

        `row` is the whole JSON row of the data set, `text` what the model generated for its prompt.

        Raises:
            DataError: the row lacks what this metric compares with.
        """
        ...


METRICS: dict[str, Metric] = {metric.name: metric for metric in (ExactMatch(), ExecutionAccuracy())}
