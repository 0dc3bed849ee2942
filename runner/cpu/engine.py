"""The loss of a model and the gradients of its adapter, written out for the CPU.

MLX's CPU backend computes element by element in one thread, keeps every array of the forward pass, and asks the
system for fresh memory each time. Here the products go to the same BLAS, all else is vectorised and shared by
threads, memory is used again, and of attention no matrix is kept. Numbers differ from MLX's in the last digits only:
`probe` compares them before they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import Llama3RoPE

from runner.config import Train
from runner.cpu import gemm as blas
from runner.cpu import kernels
from runner.cpu.attention import Rows
from runner.cpu.block import Block, Grads, norm_of, view
from runner.cpu.gemm import gemm
from runner.cpu.workspace import Workspace
from runner.models.cpu_ops import softmax_loss

_ARCHITECTURES = ("llama", "qwen2")
"""Of mlx_lm.models: blocks as `runner.cpu.block` writes them out. Mistral and SmolLM are llama there."""


VERSION = 1
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
        self._work = Workspace()

    def below(self, inputs: np.ndarray) -> np.ndarray:
        """Hidden states (batch, length, d) before the first block with an adapter, of ids (batch, length)."""
        rows = Rows([inputs.shape[1]] * len(inputs))
        return self._through(self._embedded(inputs.reshape(-1)), rows).reshape(*inputs.shape, -1)

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
        x = self._forward(params, inputs, Rows(lengths), keep=False)
        return self._head(x, positions, targets, weights, None)

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
        rows = Rows(lengths)
        x = self._forward(params, inputs, rows, keep=True)
        by_x = self._work.get("by_x", *x.shape)
        by_x[:] = 0
        loss = self._head(x, positions, targets, weights, by_x)
        grads: Grads = {}
        for number in range(len(self.blocks) - 1, self.first - 1, -1):
            block, entered = self.blocks[number], self._input_of(number, x)
            if self.recompute:
                block.forward(entered, rows, self._work.get("again", *x.shape), self._work, "any")
            keep = "any" if self.recompute else str(number)
            block.back(entered, rows, by_x, self._work, keep, grads, first=number == self.first)
        return loss, grads

    def _forward(self, params: Mapping[str, np.ndarray], inputs: np.ndarray, rows: Rows, *, keep: bool) -> np.ndarray:
        x = self._through(self._embedded(inputs), rows) if inputs.ndim == 1 else inputs
        if keep:
            entered = self._input_of(self.first, x)
            entered[:] = x
            x = entered
        for number, block in enumerate(self.blocks[self.first :], self.first):
            for group in block.groups:
                group.take(params)
            out = self._input_of(number + 1, x) if keep else self._other(x)
            block.forward(x, rows, out, self._work, str(number) if keep and not self.recompute else "any")
            x = out
        return x

    def _through(self, x: np.ndarray, rows: Rows) -> np.ndarray:
        """Through the blocks before the first with an adapter."""
        for block in self.blocks[: self.first]:
            for group in block.groups:
                group.take({})
            out = self._other(x)
            block.forward(x, rows, out, self._work, "any")
            x = out
        return x

    def _head(
        self,
        x: np.ndarray,
        positions: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        by_x: np.ndarray | None,
    ) -> float:
        """The loss; its gradient by `x` (n, d) is added to `by_x`, where that is given."""
        count = int(np.count_nonzero(weights))
        weight, eps = self.norm
        total = np.float32(0)
        for start in range(0, count, self.piece):
            part = slice(start, min(start + self.piece, count))
            chosen = x[positions[part]]
            normed, scale = self._work.get("head.normed", *chosen.shape), self._work.get("head.scale", len(chosen), 1)
            kernels.rms_norm(chosen, weight, eps, normed, scale)
            logits = gemm(normed, self.head.T, self._work.get("logits", len(chosen), len(self.head)))
            losses = softmax_loss(logits, targets[part], weights[part], gradient=by_x is not None)
            total += losses.sum(dtype=np.float32)
            if by_x is not None:
                by_normed = gemm(logits, self.head, self._work.get("head.by_normed", *chosen.shape))
                by_chosen = np.zeros_like(chosen)
                kernels.rms_norm_back(chosen, weight, scale, by_normed, by_chosen)
                by_x[positions[part]] = by_chosen
        return float(total)

    def _embedded(self, inputs: np.ndarray) -> np.ndarray:
        x = self._work.get("even", inputs.size, self.embedding.shape[1])
        np.take(self.embedding, inputs, axis=0, out=x)
        return x

    def _input_of(self, number: int, x: np.ndarray) -> np.ndarray:
        return self._work.get(f"{number}.x", *x.shape)

    def _other(self, x: np.ndarray) -> np.ndarray:
        """Where a block may write while it reads `x`."""
        even = self._work.get("even", *x.shape)
        return self._work.get("odd", *x.shape) if np.may_share_memory(even, x) else even


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
