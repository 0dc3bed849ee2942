"""A model split into its frozen trunk, the blocks above it, and the head."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

_PROBE_LENGTH = 8
_PROBE_TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest logit, of parts that compute what the whole model does."""


class Forward:
    """The forward pass of a model, in parts where these give the model's own logits.

    `split`: the head can be computed at chosen positions alone. `cut` above 0: the embedding and the first `cut` blocks
    can be computed apart, as `below`.
    """

    def __init__(self, model: nn.Module, cut: int = 0, *, verified: bool = False) -> None:
        """Compare the parts with the whole model on a probe; where they differ, `split` is False or `cut` is 0.

        `verified`: an earlier run has compared them already.
        """
        self.model = model
        self.cut = 0
        self._reload: Callable[[], nn.Module] | None = None
        head = _head_of(model)
        self.split = head is not None
        if head is None:
            return
        self._head = head
        whole = None if verified else _logits_or_none(model)
        self.split = verified or _agrees(lambda ids: head(model.model(ids)), whole)
        if not (cut and self.split):
            return
        below, above = _parts(model.model, cut)
        if verified or _agrees(lambda ids: head(above(below(ids))), whole):
            self._below, self._above, self.cut = below, above, cut
            hidden = below(mx.zeros((1, 1), mx.int32))  # not evaluated
            self.hidden_dtype: mx.Dtype = hidden.dtype
            self.hidden_size: int = hidden.shape[-1]

    def below(self, token_ids: mx.array) -> mx.array:
        """Return the hidden states (batch, length, hidden_size) at the cut, a function of the frozen base alone."""
        return self._below(token_ids)

    def hidden(self, inputs: mx.array) -> mx.array:
        """Return the hidden states (batch, length, hidden_size) that the head reads; needs `split`.

        `inputs` are token ids (batch, length), or hidden states (batch, length, hidden_size) at the cut.
        """
        return self._above(inputs) if inputs.ndim == 3 else self.model.model(inputs)

    def head(self, hidden: mx.array) -> mx.array:
        """Return float32 logits (..., vocabulary) of hidden states (..., hidden_size); needs `split`."""
        return self._head(hidden).astype(mx.float32)

    def logits(self, inputs: mx.array) -> mx.array:
        """Return float32 logits (batch, length, vocabulary); `inputs` as in `hidden`."""
        return self.head(self.hidden(inputs)) if self.split else self.model(inputs).astype(mx.float32)

    def release_below(self, reload: Callable[[], nn.Module]) -> int:
        """Free the weights below the cut and return their bytes; `reload` gives the base again to `restore_below`."""
        size = 0
        for block in self.model.model.layers[: self.cut]:
            size += sum(array.nbytes for _, array in tree_flatten(block.parameters()))
            block.update(tree_map(lambda array: mx.zeros((0,), array.dtype), block.parameters()))
        self._reload = reload
        return size

    def restore_below(self) -> bool:
        """Load weights that were released again; return whether there were any."""
        if self._reload is None:
            return False
        fresh, self._reload = self._reload(), None
        for block, other in zip(self.model.model.layers[: self.cut], fresh.model.layers, strict=False):
            block.update(other.parameters())
        return True


def _head_of(model: nn.Module) -> Callable[[mx.array], mx.array] | None:
    """Return what maps hidden states to logits in mlx-lm's models, or None in a model of another structure."""
    trunk = getattr(model, "model", None)
    if not isinstance(trunk, nn.Module):
        return None
    if isinstance(getattr(model, "lm_head", None), nn.Module):
        return model.lm_head
    return getattr(getattr(trunk, "embed_tokens", None), "as_linear", None)


def _probe() -> mx.array:
    return mx.arange(_PROBE_LENGTH)[None] + 1


def _logits_or_none(call: Callable[[mx.array], mx.array]) -> mx.array | None:
    try:
        return call(_probe()).astype(mx.float32)
    except (TypeError, AttributeError, ValueError, IndexError, KeyError):
        return None


def _agrees(parts: Callable[[mx.array], mx.array], expected: mx.array | None) -> bool:
    """Return whether `parts` gives the `expected` logits on the probe.

    Some model families scale or cap logits, or treat their blocks by position.
    """
    logits = _logits_or_none(parts)
    if logits is None or expected is None or logits.shape != expected.shape:
        return False
    scale = mx.maximum(mx.abs(expected).max(), 1e-6)
    return bool((mx.abs(logits - expected).max() <= _PROBE_TOLERANCE * scale).item())


class _Identity(nn.Module):
    """Takes the place of an embedding or a norm that the other part has."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


def _parts(trunk: nn.Module, cut: int) -> tuple[nn.Module, nn.Module]:
    """Return two shallow copies of `trunk` that share its blocks: the first `cut` ones, and the others."""
    below, above = _shallow_copy(trunk), _shallow_copy(trunk)
    below.layers, above.layers = trunk.layers[:cut], trunk.layers[cut:]
    below.norm = above.embed_tokens = _Identity()
    return below, above


def _shallow_copy(module: nn.Module) -> nn.Module:
    cls = type(module)
    copy: nn.Module = cls.__new__(cls)  # type: ignore[call-overload]
    copy.__dict__.update(module.__dict__)
    dict.update(copy, module)
    return copy
