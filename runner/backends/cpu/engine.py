"""The loss of a model and the gradients of its adapter, written out for the CPU.

MLX's CPU backend computes element by element in one thread, keeps every array of the forward pass, and asks the
system for fresh memory each time. Here the products go to the same BLAS, all else is vectorised and shared by
threads, memory is used again, and of attention no matrix is kept. Numbers differ from MLX's in the last digits only:
`probe` compares them before they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import Llama3RoPE

from runner.backends.cpu import gemm as blas
from runner.backends.cpu.block import Block, Grads, UnsupportedModel, norm_of, view
from runner.backends.cpu.head import Head, Targets
from runner.backends.cpu.ops import Ops
from runner.backends.cpu.partitions import PackedRows, Partition, Partitions

_ARCHITECTURES = ("llama", "qwen2")
"""Of mlx_lm.models: blocks as `runner.backends.cpu.block` writes them out. Mistral and SmolLM are llama there."""

VERSION = 6
"""Of the numbers: another one gives other last digits."""
_AT_ONCE = 384
"""Positions that an evaluation computes at once: more are not faster, and take more memory than training does."""
_PASSING = "0"
"""Where a block keeps what is not needed later: with what the first block with an adapter keeps in training, which
begins anew with each batch."""


EngineBatch = tuple[np.ndarray, Iterable[int], np.ndarray, np.ndarray, np.ndarray]
"""`inputs`, `lengths`, `positions`, `targets` and `weights` of `Engine.loss_and_grads`."""


class Engine:
    """A model whose last blocks carry an adapter."""

    def __init__(
        self,
        model: nn.Module,
        *,
        chunk: int,
        threads: int = 1,
        recompute: bool = False,
        ops: Ops | None = None,
    ) -> None:
        """`recompute` keeps a block's input alone and computes the block again on the way back; `ops` computes what
        lies between products, NumPy by default.

        Raises:
            UnsupportedModel: the model has a part that is not implemented here.
        """
        if type(model).__module__ not in [f"mlx_lm.models.{name}" for name in _ARCHITECTURES] or not blas.available():
            raise UnsupportedModel(type(model).__module__)
        trunk = model.model
        self.recompute = recompute
        self._rope = _Rope(model.layers[0].self_attn.rope)
        blocks = [Block(block, f"model.layers.{i}", self._rope) for i, block in enumerate(model.layers)]
        if any(getattr(block, "use_sliding", False) for block in model.layers):
            raise UnsupportedModel("sliding window")
        embedding, head = trunk.embed_tokens, getattr(model, "lm_head", None)
        if type(embedding) is not nn.Embedding or (
            head is not None and (type(head) is not nn.Linear or "bias" in head)
        ):
            raise UnsupportedModel("embedding or head")
        self.embedding = view(embedding.weight)
        self.head = Head(self.embedding if head is None else view(head.weight), norm_of(trunk.norm), chunk)
        if self.embedding.dtype != np.float32 or self.head.weight.dtype != np.float32:
            raise UnsupportedModel("not float32")
        self.first = next(
            (i for i, b in enumerate(blocks) if any(x.scale is not None for g in b.groups for x in g.linears)),
            len(blocks),
        )
        self._lower, self.blocks = blocks[: self.first], blocks[self.first :]
        self.lanes = Partitions(ops or Ops(), threads)
        self._take_none()

    @property
    def identity(self) -> str:
        """Of the numbers: another one has other last digits."""
        return f"{VERSION}, {self.lanes.ops.name}"

    def release_below(self) -> None:
        """Let go of the blocks before the first with an adapter."""
        self._lower = []

    def renew_below(self, model: nn.Module) -> None:
        """Use the blocks of `model` for them again."""
        self._lower = [
            Block(block, f"model.layers.{i}", self._rope) for i, block in enumerate(model.layers[: self.first])
        ]
        self._take_none()

    def _take_none(self) -> None:
        for block in self._lower:
            for group in block.groups:
                group.take({})

    def below(self, inputs: np.ndarray) -> np.ndarray:
        """Hidden states (batch, length, d) before the first block with an adapter, of ids (batch, length)."""
        rows = PackedRows([inputs.shape[1]] * len(inputs))
        out = np.empty((inputs.size, self.embedding.shape[1]), np.float32)

        def work(lane: Partition) -> None:
            out[lane.span] = self._through(inputs.reshape(-1)[lane.span], lane)

        self.lanes.run(work, rows)
        return out.reshape(*inputs.shape, -1)

    def loss(
        self,
        params: Mapping[str, np.ndarray],
        inputs: np.ndarray,
        lengths: Iterable[int],
        positions: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
    ) -> float:
        """The weighted sum of -log p(target); arguments as `loss_and_grads`."""
        self._take(params)
        rows, total = PackedRows(lengths), np.float32(0)
        for group in _groups(rows, _AT_ONCE):
            begin, end = rows.starts[group.start], rows.starts[group.stop - 1] + rows.lengths[group.stop - 1]
            own = np.flatnonzero((positions >= begin) & (positions < end))
            total += self._loss(
                inputs[begin:end],
                PackedRows(rows.lengths[group]),
                positions[own] - np.int32(begin),
                targets[own],
                weights[own],
            )
        return float(total)

    def _loss(
        self, inputs: np.ndarray, rows: PackedRows, positions: np.ndarray, targets: np.ndarray, weights: np.ndarray
    ) -> np.float32:
        def work(lane: Partition) -> np.float32:
            wanted = Targets.of(positions, targets, weights, len(self.head.weight), lane)
            for x in self._forward(inputs, lane, wanted.places, keep=False):
                last = x
            return self.head.loss(last, lane, wanted, None)

        return sum(self.lanes.run(work, rows), np.float32(0))

    def loss_and_grads(
        self,
        params: Mapping[str, np.ndarray],
        inputs: np.ndarray,
        lengths: Iterable[int],
        positions: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
    ) -> tuple[float, Grads]:
        """The weighted sum of -log p(target), and its gradients by `params`.

        `inputs`: ids (m,) int32, or hidden states (m, d) as `below` gives them, of rows of `lengths` one after the
        other; positions, targets (n,) int32 and weights (n,) float32, those of weight 0 last.
        """
        self._take(params)

        def work(lane: Partition) -> tuple[np.float32, Grads]:
            wanted = Targets.of(positions, targets, weights, len(self.head.weight), lane)
            entered = list(self._forward(inputs, lane, wanted.places, keep=True))
            last = entered.pop()
            by_out = lane.own.get("by_last", *last.shape)
            loss = self.head.loss(last, lane, wanted, by_out)
            grads: Grads = {}
            for number, block in reversed(list(enumerate(self.blocks))):
                x = entered.pop()
                chosen = self._chosen(number, wanted.places)
                if self.recompute:
                    block.forward(x, lane, lane.own.get("again", *by_out.shape), _PASSING, chosen)
                keep = _PASSING if self.recompute else str(number)
                by_out = block.back(x, lane, by_out, keep, grads, chosen, first=number == 0)
            return loss, grads

        (loss, grads), *others = self.lanes.run(work, PackedRows(lengths))
        for more, by_others in others:
            loss += more
            for name, grad in by_others.items():
                grads[name] += grad
        return float(loss), grads

    def _take(self, params: Mapping[str, np.ndarray]) -> None:
        for block in self.blocks:
            for group in block.groups:
                group.take(params)

    def _chosen(self, number: int, places: np.ndarray) -> np.ndarray | None:
        """Which positions need a block's output: after the last one, those that predict; all where None."""
        return places if number == len(self.blocks) - 1 else None

    def _forward(self, inputs: np.ndarray, lane: Partition, places: np.ndarray, *, keep: bool) -> Iterator[np.ndarray]:
        """What enters each block with an adapter, and at `places` what leaves the last; without `keep` each until
        the next."""
        x = self._through(inputs[lane.span], lane) if inputs.ndim == 1 else inputs[lane.span]
        if not self.blocks:
            x = x[places]
        yield x
        for number, block in enumerate(self.blocks):
            chosen = self._chosen(number, places)
            shape = x.shape if chosen is None else (len(chosen), x.shape[1])
            out = lane.own.get(f"{number}.out", *shape) if keep else self._other(x, lane, *shape)
            block.forward(x, lane, out, str(number) if keep and not self.recompute else _PASSING, chosen)
            yield out
            x = out

    def _through(self, ids: np.ndarray, lane: Partition) -> np.ndarray:
        """Through the embedding and the blocks before the first with an adapter."""
        x = lane.own.get("even", ids.size, self.embedding.shape[1])
        np.take(self.embedding, ids, axis=0, out=x)
        for block in self._lower:
            out = self._other(x, lane, *x.shape)
            block.forward(x, lane, out, _PASSING)
            x = out
        return x

    @staticmethod
    def _other(x: np.ndarray, lane: Partition, *shape: int) -> np.ndarray:
        """Where a block may write while it reads `x`."""
        even = lane.own.get("even", *shape)
        return lane.own.get("odd", *shape) if np.may_share_memory(even, x) else even


def _groups(rows: PackedRows, most: int) -> Iterator[slice]:
    """Neighbouring rows of `most` positions together, or one row of more."""
    first, count = 0, 0
    for number, length in enumerate(rows.lengths):
        if count and count + length > most:
            yield slice(first, number)
            first, count = number, 0
        count += length
    if rows.lengths:
        yield slice(first, len(rows.lengths))


class _Rope:
    """cos and sin (length, half) of the model's rotary positions."""

    def __init__(self, module: nn.Module) -> None:
        if getattr(module, "traditional", True) or type(module) not in (nn.RoPE, Llama3RoPE):
            raise UnsupportedModel(type(module).__name__)
        half = module.dims // 2
        if type(module) is nn.RoPE:
            periods = float(module.base) ** (np.arange(half) / half)
            self._speeds = float(module.scale) / periods
        else:
            self._speeds = 1.0 / view(module._freqs).astype(np.float64)
        self._known: tuple[np.ndarray, np.ndarray] = (np.zeros((0, half)), np.zeros((0, half)))

    def __call__(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        if len(self._known[0]) < length:
            angles = np.arange(length)[:, None] * self._speeds
            self._known = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        return self._known[0][:length], self._known[1][:length]
