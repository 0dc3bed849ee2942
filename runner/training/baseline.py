"""Values before the first update: an adapter whose B is zero leaves the base as it is, at any rank.

The loss is kept in the cache folder as well, so that runs on the same base and data compute it once. Nothing that
happens to the folder harms a run: what is not found whole is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runner.common import fact_cache
from runner.training.generate import GenerationResult
from runner.training.validate import ValidationResult


@dataclass
class Baseline:
    """What is known of a base on some data, empty until a job has computed it."""

    evaluation: ValidationResult | None = None
    generation: GenerationResult | None = None
    file: Path | None = None
    """Where the evaluation is kept for other runs; None: nowhere."""

    def evaluated(self, evaluation: ValidationResult) -> None:
        """Take over what was computed, and keep it."""
        self.evaluation = evaluation
        if self.file is not None:
            fact_cache.store_fact(self.file, asdict(evaluation))


def load_baseline(key: Mapping[str, Any]) -> Baseline:
    """What an earlier run has kept under `key`, which names all that the last digit depends on."""
    file = fact_cache.fact_file("baselines", key)
    return Baseline(_evaluation(fact_cache.load_fact(file) or {}), file=file)


def _evaluation(values: Mapping[str, Any]) -> ValidationResult | None:
    try:
        found = ValidationResult(
            loss=float(values["loss"]),
            supervised=int(values["supervised"]),
            tokens=int(values["tokens"]),
            seconds=float(values["seconds"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return found if math.isfinite(found.loss) else None
