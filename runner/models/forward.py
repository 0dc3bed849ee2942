"""The forward pass in two parts, trunk and head, so that the head computes only the positions that are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from runner.config.schema import TrainConfig

if TYPE_CHECKING:
    from runner.backends.cpu.engine import Engine


class Forward:
    """The hidden states and the logits of selected positions.

    Splits the model where that gives the model's own logits, else runs it whole. With a `cut` above 0 the trunk falls
    into two parts as well: `below` is the embedding and the first `cut` blocks, which no adapter touches.
    """

    def __init__(
        self,
        model: nn.Module,
        cut: int = 0,
        *,
        everywhere: bool = False,
        piece: int = TrainConfig.loss_chunk,
        proven: bool = False,
    ) -> None:
        """Probes the model; where its parts do not agree with the whole, `split` is False or `cut` is 0.

        `everywhere` computes the head at every position, and leaves out afterwards what is not asked for. `piece`:
        positions whose logits exist at once. `proven`: that the parts agree is known, and no probe is made.
        """
        self.model, self.everywhere, self.piece = model, everywhere, piece
        self.engine: Engine | None = None
        """Computes loss and gradients instead of MLX, where it is set."""
        self.why_mlx = ""
        """Where it is not set on a CPU: why."""
        self.why_numpy = ""
        """Where it has no code in C though that is wanted: why."""
        self._own: mx.array | None = None
        self.split = self._head() is not None and (proven or self._agrees(self._own_trunk))
        self.cut = 0
        self._reload: Callable[[], nn.Module] | None = None
        if cut and self.split:
            self._below, self._above = _parts(model.model, cut)
            self.cut = cut if proven or self._agrees(lambda inputs_BL: self._above(self._below(inputs_BL))) else 0
        self._own = None

    def below(self, inputs_BL: mx.array) -> mx.array:
        """Hidden states (batch, length, width) at the cut, a function of the frozen base alone."""
        return self._below(inputs_BL)

    def release_below(self, reload: Callable[[], nn.Module]) -> int:
        """Let go of the weights below the cut, and return their bytes. `reload` gives the base again, should
        `ensure_below` be asked for them."""
        blocks, size = self.model.model.layers[: self.cut], 0
        for block in blocks:
            size += sum(array.nbytes for _, array in tree_flatten(block.parameters()))
            block.update(tree_map(lambda array: mx.zeros((0,), array.dtype), block.parameters()))
        if self.engine is not None:
            self.engine.release_below()
        self._reload = reload
        return size

    def ensure_below(self) -> None:
        """Have the weights below the cut, loaded again where they were let go of."""
        if self._reload is None:
            return
        fresh, self._reload = self._reload(), None
        for block, other in zip(self.model.model.layers[: self.cut], fresh.model.layers, strict=False):
            block.update(other.parameters())
        if self.engine is not None:
            self.engine.renew_below(self.model)

    def logits(self, inputs: mx.array, positions_N: mx.array) -> mx.array:
        """Float32 logits (n, vocabulary) at `positions_N`, flat indices into (batch * length).

        `inputs` are token ids (batch, length), or hidden states (batch, length, width) at the cut.
        """
        if self.split and not self.everywhere:
            return self.head(self.selected(inputs, positions_N))
        logits_BLV = self.head(self._hidden(inputs)) if self.split else self.model(inputs)
        return logits_BLV.reshape(-1, logits_BLV.shape[-1])[positions_N].astype(mx.float32)

    def selected(self, inputs: mx.array, positions_N: mx.array) -> mx.array:
        """Hidden states (n, width) before the head; `inputs` as in `logits`. Needs `split`."""
        hidden_BLD = self._hidden(inputs)
        return hidden_BLD.reshape(-1, hidden_BLD.shape[-1])[positions_N]

    def head(self, hidden_ND: mx.array) -> mx.array:
        """Float32 logits (n, vocabulary) of hidden states. Needs `split`."""
        head = self._head()
        assert head is not None
        return head(hidden_ND).astype(mx.float32)

    def _hidden(self, inputs: mx.array) -> mx.array:
        return self._above(inputs) if inputs.ndim == 3 else self.model.model(inputs)

    def _own_trunk(self, inputs_BL: mx.array) -> mx.array:
        return self.model.model(inputs_BL)

    def _head(self) -> Callable[[mx.array], mx.array] | None:
        trunk = getattr(self.model, "model", None)
        if not isinstance(trunk, nn.Module):
            return None
        if isinstance(getattr(self.model, "lm_head", None), nn.Module):
            return self.model.lm_head
        embedding = getattr(trunk, "embed_tokens", None)
        return getattr(embedding, "as_linear", None)

    def _agrees(self, trunk: Callable[[mx.array], mx.array]) -> bool:
        """Whether `trunk` and head give the model's own logits on a probe: some families scale or cap them, or treat
        their blocks by position."""
        probe_BL = mx.arange(8)[None] + 1
        head = self._head()
        assert head is not None
        try:
            if self._own is None:
                self._own = self.model(probe_BL)
            ours, own = head(trunk(probe_BL)), self._own
        except (TypeError, AttributeError, ValueError, IndexError, KeyError):
            return False
        if ours.shape != own.shape:
            return False
        ours, own = ours.astype(mx.float32), own.astype(mx.float32)
        return bool((mx.abs(ours - own).max() <= 1e-3 * mx.maximum(mx.abs(own).max(), 1e-6)).item())


class _Same(nn.Module):
    """In place of an embedding or a norm that the other part has."""

    def __call__(self, x: mx.array) -> mx.array:
        return x


def _parts(trunk: nn.Module, cut: int) -> tuple[nn.Module, nn.Module]:
    """Two shallow copies of `trunk` that share its blocks: up to `cut`, and from there on."""
    below, above = _shallow(trunk), _shallow(trunk)
    below.layers, above.layers = trunk.layers[:cut], trunk.layers[cut:]
    below.norm = above.embed_tokens = _Same()
    return below, above


def _shallow(module: nn.Module) -> nn.Module:
    kind = type(module)
    made: nn.Module = kind.__new__(kind)  # type: ignore[call-overload]
    made.__dict__.update(module.__dict__)
    dict.update(made, module)
    return made


@contextmanager
def checkpointed(blocks: list[nn.Module], on: bool = True) -> Iterator[None]:
    """Recompute each block's activations in the backward pass, inside this context only.

    Each block gets a class of its own for the while; the model's class is never touched.
    """
    if not on:
        yield
        return
    own = [type(block) for block in blocks]
    try:
        for block, cls in zip(blocks, own, strict=True):
            block.__class__ = type(cls.__name__, (cls,), {"__call__": _recomputing(cls)})
        yield
    finally:
        for block, cls in zip(blocks, own, strict=True):
            block.__class__ = cls


def _recomputing(cls: type) -> Callable[..., mx.array]:
    def call(self: nn.Module, x: mx.array, *args: object, **kwargs: object) -> mx.array:
        if not self.training:
            return cls.__call__(self, x, *args, **kwargs)

        def block(params: dict, x: mx.array) -> mx.array:
            self.update(params)
            return cls.__call__(self, x, *args, **kwargs)

        params = self.trainable_parameters()
        out = mx.checkpoint(block)(params, x)
        self.update(params)
        return out

    return call
