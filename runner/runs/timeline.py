"""How many tokens and how much time a run had trained at each step, from its rows of metrics.jsonl."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.common.safe_json import finite_number

AXES = ("step", "tokens", "time")
"""What the progress of a run can be measured in."""
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Timeline:
    """Points (step, tokens) and (step, seconds), from the first update on; between them progress is even."""

    tokens: Points
    seconds: Points
    """Time in updates, without evaluation and saving: it does not depend on interruptions, nor on what was cached."""

    @property
    def tokens_reported(self) -> float:
        """Tokens of the updates that `seconds` covers."""
        return self.at(int(self.seconds[-1][0]), "tokens") or 0.0

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Timeline:
        """Return the timeline of a run's rows."""
        tokens: Points = [(0, 0)]
        seconds: Points = [(0, 0)]
        reported = 0.0
        for row in rows:
            step, trained = row["step"], finite_number(row.get("tokens"))
            if trained is None or step < tokens[-1][0]:
                continue
            if step > tokens[-1][0]:
                tokens.append((step, trained))
            rate = finite_number(row.get("tokens_per_second"))
            if row.get("split") == "train" and rate and rate > 0 and step > seconds[-1][0]:
                seconds.append((step, seconds[-1][1] + (trained - reported) / rate))
                reported = trained
        return cls(tokens, seconds)

    def at(self, step: int, axis: str) -> float | None:
        """Return the progress at `step` in one of `AXES`, seconds for time; None where the rows do not say."""
        if axis == "step":
            return step
        points = self.tokens if axis == "tokens" else self.seconds
        if step == 0:
            return 0.0
        if len(points) < 2:
            return None
        end = min(max(1, bisect_left(points, (step, float("-inf")))), len(points) - 1)
        (x0, y0), (x1, y1) = points[end - 1], points[end]
        return y0 + (y1 - y0) * (step - x0) / (x1 - x0)
