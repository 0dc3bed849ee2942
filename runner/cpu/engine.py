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

from runner.config import Train
from runner.cpu import gemm as blas
from runner.cpu import kernels
from runner.cpu.block import Block, Grads, norm_of, view
from runner.cpu.gemm import gemm
from runner.cpu.lanes import Lane, Lanes, Rows

_ARCHITECTURES = ("llama", "qwen2")
"""Of mlx_lm.models: blocks as `runner.cpu.block` writes them out. Mistral and SmolLM are llama there."""

_LEAST_PIECE = 64
"""Of positions whose logits one of many lanes computes at once."""
VERSION = 2
"""Of the numbers: another one gives other last digits."""


class Engine:
    """A model whose last blocks carry an adapter."""

    def __init__(self, model: nn.Module, *, recompute: bool = False, piece: int = Train.loss_piece) -> None:
        """`recompute` keeps a block's input alone and computes the block again on the way back.

        Raises:
            TypeError: the model has a part that is not written out here.
        """
        trunk = model.model
        if type(model).__module__ not in [f"mlx_lm.models.{name}" for name in _ARCHITECTURES] or not blas.available():
            raise TypeError(type(model).__module__)
        self.recompute, self.piece = recompute, piece
        rope = _Rope(model.layers[0].self_attn.rope)
        self.blocks = [Block(block, f"model.layers.{i}", rope) for i, block in enumerate(model.layers)]
        if any(getattr(block, "use_sliding", False) for block in model.layers):
            raise TypeError("sliding window")
        self.norm = norm_of(trunk.norm)
        embedding, head = trunk.embed_tokens, getattr(model, "lm_head", None)
        if type(embedding) is not nn.Embedding or (
            head is not None and (type(head) is not nn.Linear or "bias" in head)
        ):
            raise TypeError("embedding or head")
        self.embedding = view(embedding.weight)
        self.head = self.embedding if head is None else view(head.weight)
        if self.embedding.dtype != np.float32 or self.head.dtype != np.float32:
            raise TypeError("not float32")
        self.first = next(
            (i for i, b in enumerate(self.blocks) if any(x.scale is not None for g in b.groups for x in g.linears)),
            len(self.blocks),
        )
        self._lanes = Lanes()
        for block in self.blocks[: self.first]:
            for group in block.groups:
                group.take({})

    def below(self, inputs: np.ndarray) -> np.ndarray:
        """Hidden states (batch, length, d) before the first block with an adapter, of ids (batch, length)."""
        rows = Rows([inputs.shape[1]] * len(inputs))
        out = np.empty((inputs.size, self.embedding.shape[1]), np.float32)

        def work(lane: Lane) -> None:
            out[lane.span] = self._through(inputs.reshape(-1)[lane.span], lane)

        self._lanes.run(work, rows)
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

        def work(lane: Lane) -> np.float32:
            for x in self._forward(inputs, lane, keep=False):
                last = x
            return self._head(last, lane, positions, targets, weights, None)

        return float(sum(self._lanes.run(work, Rows(lengths)), np.float32(0)))

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

        def work(lane: Lane) -> tuple[np.float32, Grads]:
            entered = list(self._forward(inputs, lane, keep=True))
            last = entered.pop()
            by_x = lane.own.get("by_x", *last.shape)
            by_x[:] = 0
            loss = self._head(last, lane, positions, targets, weights, by_x)
            grads: Grads = {}
            for number in range(len(self.blocks) - 1, self.first - 1, -1):
                block, x = self.blocks[number], entered.pop()
                if self.recompute:
                    block.forward(x, lane, lane.own.get("again", *x.shape), "any")
                block.back(x, lane, by_x, "any" if self.recompute else str(number), grads, first=number == self.first)
            return loss, grads

        (loss, grads), *others = self._lanes.run(work, Rows(lengths))
        for more, by_others in others:
            loss += more
            for name, grad in by_others.items():
                grads[name] += grad
        return float(loss), grads

    def _take(self, params: Mapping[str, np.ndarray]) -> None:
        for block in self.blocks[self.first :]:
            for group in block.groups:
                group.take(params)

    def _forward(self, inputs: np.ndarray, lane: Lane, *, keep: bool) -> Iterator[np.ndarray]:
        """What enters each block with an adapter, and what leaves the last; without `keep` each until the next."""
        x = self._through(inputs[lane.span], lane) if inputs.ndim == 1 else inputs[lane.span]
        yield x
        for number, block in enumerate(self.blocks[self.first :], self.first):
            out = lane.own.get(f"{number}.out", *x.shape) if keep else self._other(x, lane)
            block.forward(x, lane, out, str(number) if keep and not self.recompute else "any")
            yield out
            x = out

    def _through(self, ids: np.ndarray, lane: Lane) -> np.ndarray:
        """Through the embedding and the blocks before the first with an adapter."""
        x = lane.own.get("even", ids.size, self.embedding.shape[1])
        np.take(self.embedding, ids, axis=0, out=x)
        for block in self.blocks[: self.first]:
            out = self._other(x, lane)
            block.forward(x, lane, out, "any")
            x = out
        return x

    def _head(
        self,
        x: np.ndarray,
        lane: Lane,
        positions: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        by_x: np.ndarray | None,
    ) -> np.float32:
        """The loss of the lane's positions; its gradient by `x` (n, d) is added to `by_x`, where that is given."""
        span, work = lane.span, lane.own
        mine = np.flatnonzero((positions >= span.start) & (positions < span.stop) & (weights != 0))
        weight, eps = self.norm
        # Each lane reads the head's weights for each of its pieces: smaller ones are slower, larger ones take memory.
        total, piece = np.float32(0), min(self.piece, max(_LEAST_PIECE, 2 * self.piece // lane.count))
        for start in range(0, len(mine), piece):
            part = mine[start : start + piece]
            places = positions[part] - span.start
            chosen = x[places]
            normed, scale = work.get("head.normed", *chosen.shape), work.get("head.scale", len(chosen), 1)
            kernels.rms_norm(chosen, weight, eps, normed, scale)
            logits = gemm(normed, self.head.T, work.get("logits", len(chosen), len(self.head)))
            losses = kernels.softmax_loss(logits, targets[part], weights[part], gradient=by_x is not None)
            total += losses.sum(dtype=np.float32)
            if by_x is not None:
                by_normed = gemm(logits, self.head, work.get("head.by_normed", *chosen.shape))
                by_chosen = np.zeros_like(chosen)
                kernels.rms_norm_back(chosen, weight, scale, by_normed, by_chosen)
                by_x[places] = by_chosen
        return total

    @staticmethod
    def _other(x: np.ndarray, lane: Lane) -> np.ndarray:
        """Where a block may write while it reads `x`."""
        even = lane.own.get("even", *x.shape)
        return lane.own.get("odd", *x.shape) if np.may_share_memory(even, x) else even


class _Rope:
    """cos and sin (length, half) of the model's rotary positions."""

    def __init__(self, module: nn.Module) -> None:
        if getattr(module, "traditional", True) or type(module) not in (nn.RoPE, Llama3RoPE):
            raise TypeError(type(module).__name__)
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
