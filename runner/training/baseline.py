"""What is known before the first update: an adapter with B = 0 leaves the base model unchanged, at any rank.

The validation loss is also cached on disk, so that runs on the same base model and data compute it once. A missing or
corrupt entry is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runner.common.result_cache import CachedResult
from runner.runs.row_losses import MAX_ROWS, rounded_losses
from runner.training.evaluate import EvaluatedRows, EvaluationResult
from runner.training.generate import GenerationResult


@dataclass
class Baseline:
    """Results of a base model on a data set, None until a run has computed them."""

    validation: EvaluationResult | None = None
    generation: GenerationResult | None = None
    """Shared by the jobs of this process only."""
    cached_validation: CachedResult | None = None
    """Cache entry of the validation result; None if it is not cached on disk."""

    def store(self) -> None:
        """Write the validation result to the cache."""
        if self.validation is not None and self.cached_validation is not None:
            self.cached_validation.store(validation_values(self.validation))


def load_baseline(key: Mapping[str, Any]) -> Baseline:
    """Return the baseline cached under `key`, which has to contain everything that the loss depends on."""
    cached = CachedResult.of("baselines", key)
    return Baseline(validation_result(cached.load(numbers=2 * MAX_ROWS) or {}), cached_validation=cached)


def validation_values(result: EvaluationResult) -> dict[str, Any]:
    """Return a validation result as JSON holds it."""
    kept = len(result.rows.losses) if len(result.rows.losses) <= MAX_ROWS else 0  # more are not recorded either
    rows = {"losses": rounded_losses(result.rows.losses[:kept]), "tokens": result.rows.tokens[:kept].tolist()}
    fields = ("loss", "supervised", "tokens", "seconds", "measures")
    return {**{name: getattr(result, name) for name in fields}, "rows": rows}


def validation_result(values: Mapping[str, Any]) -> EvaluationResult | None:
    """Return the result that `validation_values` was given, or None; an earlier version stored no rows."""
    try:
        result = EvaluationResult(
            loss=float(values["loss"]),
            supervised=int(values["supervised"]),
            tokens=int(values["tokens"]),
            seconds=float(values["seconds"]),
            rows=EvaluatedRows(
                indices=np.arange(len(values["rows"]["losses"])),
                losses=np.array(values["rows"]["losses"], np.float64),
                tokens=np.array(values["rows"]["tokens"], np.int64),
            ),
            measures={str(name): float(value) for name, value in dict(values.get("measures", {})).items()},
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    rows = result.rows
    is_whole = rows.losses.ndim == 1 and rows.losses.shape == rows.tokens.shape and np.isfinite(rows.losses).all()
    return result if is_whole and math.isfinite(result.loss) else None
