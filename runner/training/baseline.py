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
from runner.training.generate import GenerationResult
from runner.training.validate import ValidationResult


@dataclass
class Baseline:
    """Results of a base model on a data set, None until a run has computed them."""

    validation: ValidationResult | None = None
    generation: GenerationResult | None = None
    fact: CachedResult | None = None
    """Cache entry of the validation result; None if it is not cached on disk."""

    def store_validation(self, result: ValidationResult) -> None:
        """Set the validation result and write it to the cache; writing again marks the entry as recently used."""
        self.validation = result
        if self.fact is not None:
            self.fact.store(asdict(result))


def load_baseline(key: Mapping[str, Any]) -> Baseline:
    """Return the baseline cached under `key`, which has to contain everything that the loss depends on."""
    fact = CachedResult.of("baselines", key)
    return Baseline(_validation_result(fact.load() or {}), fact=fact)


def _validation_result(values: Mapping[str, Any]) -> ValidationResult | None:
    try:
        result = ValidationResult(
            loss=float(values["loss"]),
            supervised=int(values["supervised"]),
            tokens=int(values["tokens"]),
            seconds=float(values["seconds"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return result if math.isfinite(result.loss) else None
