"""The hidden-state cache of a backend's frozen blocks."""

from __future__ import annotations

from collections.abc import Callable

from runner.backends import blas
from runner.backends.protocol import Backend
from runner.config.schema import Config
from runner.models.hidden_cache import HiddenStateCaches, numeric_platform
from runner.models.load import BaseModel


def hidden_caches(
    backend: Backend, base: BaseModel, config: Config, log: Callable[[str], None]
) -> HiddenStateCaches | None:
    """Return the cache of the hidden states after the frozen blocks of `backend`, or None if it has none."""
    split_model = backend.split_model
    if not split_model.frozen_blocks:
        return None
    cache_key_parts = {
        "base": base.content_hash,
        "cut": split_model.frozen_blocks,  # other names of the parts would leave all cached states unused
        "blas": blas.identity(),
        "engine": backend.kernel_version,
        # An earlier version computed blocks apart by a forward pass of its own, which some families do not have.
        **({} if backend.kernel_version else {"parts": 2}),
        **numeric_platform(),
    }
    return HiddenStateCaches(
        backend.run_frozen_blocks,
        dtype=split_model.hidden_dtype,
        hidden_size=split_model.hidden_size,
        cache_key_parts=cache_key_parts,
        config=config.train.hidden_cache,
        log=log,
    )
