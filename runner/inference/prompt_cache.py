"""The key-value cache of a conversation, from which a turn takes what it has in common with the turns before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache


class PromptCache:
    """mlx-lm's caches of one model, and the tokens that they hold."""

    def __init__(self) -> None:
        self._caches: list[Any] | None = None
        self._tokens: list[int] = []

    def reuse(self, model: nn.Module, prompt: Sequence[int]) -> tuple[list[Any], int]:
        """Return caches that hold a beginning of `prompt`, and its length: shorter than the prompt, as the last token
        is always computed.

        Until `store` is called, nothing is kept: a computation that is cut short may leave the caches in any state.
        """
        caches, held = self._caches, self._tokens
        self.clear()
        common = _common_length(held, prompt[:-1])
        if caches is None or not common or not _shorten(caches, len(held) - common):
            return make_prompt_cache(model), 0
        return caches, common

    def store(self, caches: list[Any], tokens: Sequence[int]) -> None:
        """Keep `caches`, which hold exactly `tokens`."""
        self._caches, self._tokens = caches, list(tokens)

    def clear(self) -> None:
        """Free the caches."""
        self._caches, self._tokens = None, []


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )


def _shorten(caches: list[Any], tokens: int) -> bool:
    """Remove the last `tokens` from the caches; False where what came before them is lost already, as in a recurrent
    state or beyond an attention window."""
    if tokens == 0:
        return True
    # A chunked cache says that it can be trimmed also after it has dropped its first tokens.
    dropped = any(getattr(part, "start_position", 0) for cache in caches for part in getattr(cache, "caches", [cache]))
    return not dropped and can_trim_prompt_cache(caches) and all([cache.trim(tokens) == tokens for cache in caches])
