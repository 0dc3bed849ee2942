"""Linear layers with LoRA (Hu et al., 2021), forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from runner.backends.cpu.gemm import gemm
from runner.backends.cpu.workspace import Workspace
from runner.models.mlx_lm_tuner import LoRALinear

Grads = dict[str, np.ndarray]
"""Gradients by parameter name."""


class UnsupportedModel(Exception):
    """Raised when the model has a part that the engine does not implement."""


def as_numpy(array: mx.array) -> np.ndarray:
    """Return the NumPy array that shares the memory of an MLX array, which has been evaluated."""
    return np.array(array, copy=False)


@dataclass(frozen=True)
class Linear:
    """One frozen linear layer, y = x Wᵀ + b; with LoRA, + scale (x A) B."""

    name: str
    """Dotted path in the model."""
    weight: np.ndarray
    """(outputs, inputs)."""
    bias: np.ndarray | None
    scale: float | None
    """None without LoRA."""

    @classmethod
    def from_module(cls, module: nn.Module, name: str) -> Linear:
        """Return the layer of `module`, sharing its weights.

        Raises:
            UnsupportedModel: another kind of layer, or not float32.
        """
        scale = float(module.scale) if isinstance(module, LoRALinear) else None
        base = module.linear if isinstance(module, LoRALinear) else module
        if type(base) is not nn.Linear or base.weight.dtype != mx.float32:
            raise UnsupportedModel(name)
        return cls(name, as_numpy(base.weight), as_numpy(base.bias) if "bias" in base else None, scale)


class LinearGroup:
    """Linear layers that read the same input (n, inputs), such as q, k and v: one product serves all of their A."""

    def __init__(self, linears: Sequence[Linear], name: str) -> None:
        """`name` is that of the group's buffers in a workspace, unique in the block."""
        self.linears, self._name = linears, name
        self._adapted = [linear for linear in linears if linear.scale is not None]
        self._a: np.ndarray | None = None
        """All A side by side, times their scales."""
        self._b: list[np.ndarray] = []
        self._ranks: list[int] = []

    def load(self, params: Mapping[str, np.ndarray]) -> None:
        """Use the factors A (inputs, r) and B (r, outputs) in `params` from now on."""
        if not self._adapted:
            return
        self._b = [params[f"{linear.name}.lora_b"] for linear in self._adapted]
        factors = [params[f"{linear.name}.lora_a"] for linear in self._adapted]
        self._ranks = [a.shape[1] for a in factors]
        scaled = [a * linear.scale for a, linear in zip(factors, self._adapted, strict=True)]
        self._a = np.concatenate(scaled, axis=1)

    def forward(
        self, x: np.ndarray, outs: Sequence[np.ndarray], work: Workspace, slot: str, *, add: bool = False
    ) -> None:
        """Write each layer's output to `outs`, or add it; `slot` names the buffers that the backward pass reads."""
        for linear, out in zip(self.linears, outs, strict=True):
            gemm(x, linear.weight.T, out, add=add)
            if linear.bias is not None:
                out += linear.bias
        if self._a is not None:
            xa = gemm(x, self._a, self._xa_buffer(work, slot, len(x)))
            for _, b, columns, out in self._with_adapters(outs):
                gemm(xa[:, columns], b, out, add=True)

    def backward(
        self, grad_outs: Sequence[np.ndarray], grad_x: np.ndarray | None, work: Workspace, slot: str, grads: Grads
    ) -> None:
        """Write the gradient by the input to `grad_x`, unless it is None, and those of the factors B to `grads`."""
        n = len(grad_outs[0])
        if grad_x is not None:
            for i, (linear, grad_out) in enumerate(zip(self.linears, grad_outs, strict=True)):
                gemm(grad_out, linear.weight, grad_x, add=i > 0)
        if self._a is None:
            return
        xa, grad_xa = self._xa_buffer(work, slot, n), work.buffer("grad_xa", n, sum(self._ranks))
        for linear, b, columns, grad_out in self._with_adapters(grad_outs):
            gemm(grad_out, b.T, grad_xa[:, columns])
            grads[f"{linear.name}.lora_b"] = gemm(xa[:, columns].T, grad_out, np.empty(b.shape, np.float32))
        if grad_x is not None:
            gemm(grad_xa, self._a.T, grad_x, add=True)

    def backward_a(self, x: np.ndarray, work: Workspace, grads: Grads) -> None:
        """Write the gradients of the factors A to `grads`, right after `backward`; they need the input `x` again."""
        if self._a is None:
            return
        grad_xa = work.buffer("grad_xa", len(x), sum(self._ranks))
        grad_a = gemm(x.T, grad_xa, work.buffer("grad_a", *self._a.shape))
        for linear, _, columns, _ in self._with_adapters([x] * len(self.linears)):
            assert linear.scale is not None
            grads[f"{linear.name}.lora_a"] = grad_a[:, columns] * np.float32(linear.scale)

    def _with_adapters(self, arrays: Sequence[np.ndarray]) -> Iterator[tuple[Linear, np.ndarray, slice, np.ndarray]]:
        """Yield each layer with LoRA, its B, its columns among those of all A, and its element of `arrays`."""
        start, i = 0, 0
        for linear, array in zip(self.linears, arrays, strict=True):
            if linear.scale is not None:
                yield linear, self._b[i], slice(start, start + self._ranks[i]), array
                start, i = start + self._ranks[i], i + 1

    def _xa_buffer(self, work: Workspace, slot: str, count: int) -> np.ndarray:
        """Return the buffer (count, sum of ranks) of x A, kept for the backward pass."""
        return work.buffer(f"{slot}.{self._name}.xa", count, sum(self._ranks))
