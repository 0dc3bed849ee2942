"""What is known before the first update: an adapter with B = 0 leaves the base model unchanged, at any rank.

The validation loss is also cached on disk, so that runs on the same base model and data compute it once. A missing or
corrupt entry is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from runner.common.result_cache import CachedResult
from runner.training.evaluate import EvaluationResult
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
        """Write the validation result to the cache; writing again marks the entry as recently used."""
        if self.validation is not None and self.cached_validation is not None:
            self.cached_validation.store(asdict(self.validation))


def load_baseline(key: Mapping[str, Any]) -> Baseline:
    """Return the baseline cached under `key`, which has to contain everything that the loss depends on."""
    cached = CachedResult.of("baselines", key)
    return Baseline(_validation_result(cached.load() or {}), cached_validation=cached)


def _validation_result(values: Mapping[str, Any]) -> EvaluationResult | None:
    try:
        result = EvaluationResult(
            loss=float(values["loss"]),
            supervised=int(values["supervised"]),
            tokens=int(values["tokens"]),
            seconds=float(values["seconds"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return result if math.isfinite(result.loss) else None
