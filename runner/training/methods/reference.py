"""The log-probabilities of answers by the reference: the model as it was before training.

They depend on the weights and the rows alone, are computed once for a split, and are cached on disk: runs with other
settings, and resumed ones, read them there. They are computed in batches of their own, so that a resume computes the
same digits again should the cache be gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from runner.backends.protocol import Backend
from runner.common.result_cache import CachedResult
from runner.common.text import count
from runner.config.schema import Config
from runner.data.order import evaluation_batches
from runner.data.token_set import TokenSet
from runner.models.hidden_cache import HiddenStateCaches, numeric_platform
from runner.models.lora import Params
from runner.training.dataloader import EvaluationLoader, batch_builder, join_batches
from runner.training.evaluate import evaluate
from runner.training.world import ALONE, World

BASE = "base"
"""Fingerprint of a reference that is the base model."""
_BATCH_ROWS, _BATCH_POSITIONS = 8, 2048


@dataclass
class Reference:
    """The reference of a run."""

    backend: Backend
    config: Config
    caches: HiddenStateCaches | None
    base: str
    """Hash of the base model's weights."""
    fingerprint: str
    """Of the adapter before training: `BASE`, or the hash of a warm start's weights."""
    params: Callable[[], Params]
    """Returns the adapter before training; called only where something has to be computed."""
    token_sets: Mapping[str, TokenSet]
    check_stop: Callable[[], None]
    log: Callable[[str], None]
    world: World = ALONE
    _found: dict[str, np.ndarray] = field(default_factory=dict)

    def log_probs(self, split: str) -> np.ndarray:
        """Return the log-probability of the supervised tokens of each row of `split`, (rows,) float64.

        Raises:
            CheckpointError: the adapter before training is not there any more, or has changed.
            StopRequested: a stop signal arrived.
        """
        if split not in self._found:
            token_set = self.token_sets[split]
            cached = CachedResult.of("references", self._key(token_set))
            values = _stored((cached.load(numbers=len(token_set)) or {}).get("log_probs"), len(token_set))
            values = self._of_first_rank(values, len(token_set))
            if values is None:
                values = self._compute(split, token_set)
                if self.world.is_first:
                    cached.store({"log_probs": values.tolist()})
            self._found[split] = values
        return self._found[split]

    def _compute(self, split: str, token_set: TokenSet) -> np.ndarray:
        self.log(f"reference: computing the log-probabilities of {count(len(token_set), f'{split} answer')}, once")
        builder = batch_builder(token_set.grouped(1), self.config, self.caches)
        batches = evaluation_batches(token_set.lengths, _BATCH_ROWS)
        joined = join_batches(batches, token_set.lengths, builder.buckets, _BATCH_POSITIONS)
        loader = EvaluationLoader(builder, joined, self.world)
        found = evaluate(self.backend, self.params(), loader, self.check_stop, self.world)
        return -found.rows.losses

    def _of_first_rank(self, values: np.ndarray | None, rows: int) -> np.ndarray | None:
        """Return what rank 0 has found in its cache: where that is nothing, all ranks compute together."""
        if self.world.size == 1:
            return values
        content = self.world.broadcast(b"" if values is None else values.tobytes())
        return np.frombuffer(content, np.float64) if len(content) == 8 * rows else None

    def _key(self, token_set: TokenSet) -> dict[str, Any]:
        return {
            "base": self.base,
            "adapter": self.fingerprint,
            "rows": token_set.fingerprint,
            "pad_to": self.config.data.pad_to,
            "lora_dtype": self.config.lora.dtype if self.fingerprint != BASE else None,
            "environment": {**self.backend.numeric_environment(), **numeric_platform()},
        }


def params_fingerprint(params: Params) -> str:
    """Return the SHA-256 (hex) of adapter weights."""
    digest = hashlib.sha256()
    for name, array in sorted(params.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.array(array.astype(mx.float32)).tobytes())
    return digest.hexdigest()


def _stored(values: Any, rows: int) -> np.ndarray | None:
    """Return cached values, or None unless they are `rows` finite numbers."""
    try:
        found = np.array(values, np.float64)
    except (TypeError, ValueError):
        return None
    return found if found.shape == (rows,) and bool(np.isfinite(found).all()) else None
