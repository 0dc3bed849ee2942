"""A model split into its frozen blocks, the trained blocks above them, and the head.

The forward pass of a family is not written again here, where its masks, scales and positions would have to be repeated:
each part is computed by calling the model itself, with other parts standing in. Frozen blocks that stand in return the
cached hidden states, and a trunk that stands in returns the states that the head is to be computed from. MLX is lazy,
so what is not needed, such as the embedding below cached states, is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from runner.models.stand_in import output_of, stand_in


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Into which parts a model can be split; `split_probe.find_parts` finds and verifies them."""

    trunk: str | None = None
    """Dotted name of the module whose output the head reads; None where the head cannot be computed separately."""
    frozen_blocks: int = 0
    """Number of blocks whose output can be cached; 0 where none is to be, or where it cannot."""
    reason: str | None = None
    """Why the frozen blocks cannot be computed separately; None where they can or are not wanted."""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Parts:
        """Return the parts from the values that `asdict` gives."""
        return cls(trunk=values["trunk"], frozen_blocks=values["frozen_blocks"], reason=values["reason"])


class SplitModel:
    """The forward pass of a model in parts."""

    has_separate_head: bool
    """Whether the head can be computed at chosen positions alone."""
    frozen_blocks: int
    """Number of blocks that `run_frozen_blocks` computes apart, with the embedding; 0 where that is not possible."""

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        self.model, self.parts, self.frozen_blocks = model, parts, parts.frozen_blocks
        self._trunk = None if parts.trunk is None else dict(model.named_modules())[parts.trunk]
        self.has_separate_head = self._trunk is not None
        self._frozen: list[nn.Module] = list(model.layers)[: parts.frozen_blocks]
        self._reload: Callable[[], nn.Module] | None = None
        if self._frozen:
            hidden = self.run_frozen_blocks(mx.zeros((1, 1), mx.int32))  # not evaluated
            self.hidden_dtype: mx.Dtype = hidden.dtype
            self.hidden_size: int = hidden.shape[-1]

    def run_frozen_blocks(self, token_ids: mx.array) -> mx.array:
        """Return the hidden states (batch, length, hidden_size) after the frozen blocks."""
        return output_of(self._frozen[-1], lambda: self.model(token_ids))

    def hidden(self, token_ids: mx.array, states: mx.array | None = None) -> mx.array:
        """Return the hidden states (batch, length, hidden_size) that the head reads; needs `has_separate_head`.

        `token_ids` (batch, length); `states`: what `run_frozen_blocks` returns for them, or None.
        """
        assert self._trunk is not None
        with self._cached(states):
            return output_of(self._trunk, lambda: self.model(token_ids))

    def head(self, hidden: mx.array) -> mx.array:
        """Return float32 logits (..., vocabulary) of hidden states (..., hidden_size); needs `has_separate_head`."""
        assert self._trunk is not None
        states = hidden.reshape(1, -1, hidden.shape[-1])
        with stand_in([self._trunk], lambda index, own_call, *args, **kwargs: states):
            logits = self.model(mx.zeros((1, 1), mx.int32))
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1]).astype(mx.float32)

    def logits(self, token_ids: mx.array, states: mx.array | None = None) -> mx.array:
        """Return float32 logits (batch, length, vocabulary); arguments as in `hidden`."""
        with self._cached(states):
            return self.model(token_ids).astype(mx.float32)

    def free_frozen_weights(self, reload: Callable[[], nn.Module]) -> int:
        """Free the weights of the frozen blocks and return their bytes; `reload` loads the base model again."""
        size = 0
        for block in self._frozen:
            size += sum(array.nbytes for _, array in tree_flatten(block.parameters()))
            block.update(tree_map(lambda array: mx.zeros((0,), array.dtype), block.parameters()))
        self._reload = reload
        return size

    def reload_frozen_weights(self) -> bool:
        """Load the weights again if they were freed; return whether they were."""
        if self._reload is None:
            return False
        fresh, self._reload = self._reload(), None
        for block, other in zip(self._frozen, fresh.layers, strict=False):
            block.update(other.parameters())
        return True

    @contextmanager
    def _cached(self, states: mx.array | None) -> Iterator[None]:
        """Let the frozen blocks return `states`, unless these are None."""
        if states is None:
            yield
            return
        with stand_in(self._frozen, lambda index, own_call, *args, **kwargs: states):
            yield
