"""A model split into its frozen blocks, the trained blocks above them, and the head."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

_PROBE_LENGTH = 8
_PROBE_TOLERANCE = 1e-3
"""Largest difference of logits, relative to the largest logit, of parts that compute what the whole model does."""


class SplitModel:
    """The forward pass of a model, in parts where these give the model's own logits."""

    has_separate_head: bool
    """Whether the head can be computed at chosen positions alone."""
    frozen_blocks: int
    """Number of blocks that `run_frozen_blocks` computes apart, with the embedding; 0 where that is not possible."""

    def __init__(self, model: nn.Module, frozen_blocks: int = 0, *, verified: bool = False) -> None:
        """Compare the parts with the whole model on a probe, and use only those that agree.

        `verified`: an earlier run has compared them already.
        """
        self.model, self.frozen_blocks = model, 0
        self._reload: Callable[[], nn.Module] | None = None
        head = _head_of(model)
        self.has_separate_head = head is not None
        if head is None:
            return
        self._head = head
        whole = None if verified else _logits_or_none(model)
        self.has_separate_head = verified or _agrees(lambda ids: head(model.model(ids)), whole)
        if not (frozen_blocks and self.has_separate_head):
            return
        frozen, trained = _split_decoder(model.model, frozen_blocks)
        if verified or _agrees(lambda ids: head(trained(frozen(ids))), whole):
            self._frozen, self._trained, self.frozen_blocks = frozen, trained, frozen_blocks
            hidden = frozen(mx.zeros((1, 1), mx.int32))  # not evaluated
            self.hidden_dtype: mx.Dtype = hidden.dtype
            self.hidden_size: int = hidden.shape[-1]

    def run_frozen_blocks(self, token_ids: mx.array) -> mx.array:
        """Return the hidden states (batch, length, hidden_size) after the frozen blocks."""
        return self._frozen(token_ids)

    def hidden(self, inputs: mx.array) -> mx.array:
        """Return the hidden states (batch, length, hidden_size) that the head reads; needs `has_separate_head`.

        `inputs` are token ids (batch, length), or what `run_frozen_blocks` returns for them.
        """
        return self._trained(inputs) if inputs.ndim == 3 else self.model.model(inputs)

    def head(self, hidden: mx.array) -> mx.array:
        """Return float32 logits (..., vocabulary) of hidden states (..., hidden_size); needs `has_separate_head`."""
        return self._head(hidden).astype(mx.float32)

    def logits(self, inputs: mx.array) -> mx.array:
        """Return float32 logits (batch, length, vocabulary); `inputs` as in `hidden`."""
        return self.head(self.hidden(inputs)) if self.has_separate_head else self.model(inputs).astype(mx.float32)

    def free_frozen_weights(self, reload: Callable[[], nn.Module]) -> int:
        """Free the weights of the frozen blocks and return their bytes; `reload` loads the base model again."""
        size = 0
        for block in self.model.model.layers[: self.frozen_blocks]:
            size += sum(array.nbytes for _, array in tree_flatten(block.parameters()))
            block.update(tree_map(lambda array: mx.zeros((0,), array.dtype), block.parameters()))
        self._reload = reload
        return size

    def reload_frozen_weights(self) -> bool:
        """Load the weights again if they were freed; return whether they were."""
        if self._reload is None:
            return False
        fresh, self._reload = self._reload(), None
        for block, other in zip(self.model.model.layers[: self.frozen_blocks], fresh.model.layers, strict=False):
            block.update(other.parameters())
        return True


def _head_of(model: nn.Module) -> Callable[[mx.array], mx.array] | None:
    """Return what maps hidden states to logits in mlx-lm's models, or None in a model of another structure."""
    decoder = getattr(model, "model", None)
    if not isinstance(decoder, nn.Module):
        return None
    if isinstance(getattr(model, "lm_head", None), nn.Module):
        return model.lm_head
    return getattr(getattr(decoder, "embed_tokens", None), "as_linear", None)


def _logits_or_none(call: Callable[[mx.array], mx.array]) -> mx.array | None:
    """Return the logits of the probe, or None where the model has another structure than `call` expects."""
    try:
        return call(mx.arange(_PROBE_LENGTH)[None] + 1).astype(mx.float32)
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


def _split_decoder(decoder: nn.Module, count: int) -> tuple[nn.Module, nn.Module]:
    """Return two shallow copies of `decoder` that share its blocks: the first `count` ones, and the others."""
    frozen, trained = _shallow_copy(decoder), _shallow_copy(decoder)
    frozen.layers, trained.layers = decoder.layers[:count], decoder.layers[count:]
    frozen.norm = trained.embed_tokens = _Identity()
    return frozen, trained


def _shallow_copy(module: nn.Module) -> nn.Module:
    cls = type(module)
    copy: nn.Module = cls.__new__(cls)  # type: ignore[call-overload]
    copy.__dict__.update(module.__dict__)
    dict.update(copy, module)
    return copy
