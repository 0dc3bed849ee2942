"""The hidden-state cache of a backend's frozen trunk."""

from __future__ import annotations

from collections.abc import Callable

from runner.backends.blas import BlasReport, blas_identity
from runner.backends.protocol import Backend
from runner.config.schema import Config
from runner.models.hidden_cache import HiddenStateCaches, numeric_platform
from runner.models.load import BaseModel


def hidden_caches(
    backend: Backend, base: BaseModel, config: Config, blas: BlasReport, log: Callable[[str], None]
) -> HiddenStateCaches | None:
    """Return the cache of the hidden states that `backend` computes below its cut, or None where it has no cut."""
    forward = backend.forward
    if not forward.cut:
        return None
    identity = {
        "base": base.content_hash,
        "cut": forward.cut,
        "blas": blas_identity(blas),
        "engine": backend.identity,
        **numeric_platform(),
    }
    return HiddenStateCaches(
        backend.hidden_below,
        dtype=forward.hidden_dtype,
        hidden_size=forward.hidden_size,
        identity=identity,
        config=config.train.hidden_cache,
        log=log,
    )
