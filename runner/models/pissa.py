"""The start of PiSSA: the principal singular vectors of a weight as the factors of an adapter.

Meng et al., arXiv:2404.02948. With W = U S V, A0 = V_r sqrt(S_r / s) and B0 = sqrt(S_r / s) U_r, where s is the factor
of the update, so that s B0 A0 is the best approximation of W of rank r. A large weight is decomposed by subspace
iteration (Halko et al., arXiv:0909.4061), with the 16 iterations that the paper recommends for accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from runner.checkpoints.safetensors_file import Tensor
from runner.models import quantization
from runner.models.adapter_layers import PissaLinear

_LARGEST_EXACT = 1024
"""Smaller side up to which all singular values are computed: that takes less than a second."""
_ITERATIONS = 16
_OVERSAMPLING = 16
_SEED = 0


def set_start(layer: PissaLinear, dtype: mx.Dtype = mx.float32) -> None:
    """Set the factors of `layer` and their start; `dtype`: that of the products that subtract the start."""
    a, b = principal_factors(_weight(layer.linear), layer.lora_a.shape[1], layer.scale)
    layer.lora_a, layer.lora_b = mx.array(a), mx.array(b)
    layer.set_start(layer.lora_a, layer.lora_b, dtype)


def principal_factors(weight: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return A (inputs, rank) and B (rank, outputs) with scale (A B)ᵀ the best approximation of `weight`.

    `weight` (outputs, inputs) float32. Columns of A and rows of B beyond the rank of the weight are zero.
    """
    u, s, vt = _principal(weight, rank)
    root = np.sqrt(s / scale).astype(np.float32)
    a, b = np.zeros((weight.shape[1], rank), np.float32), np.zeros((rank, weight.shape[0]), np.float32)
    a[:, : len(s)], b[: len(s)] = vt.T * root, (u * root).T
    return a, b


def _principal(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the largest `rank` singular values and their vectors: (outputs, r), (r,), (r, inputs)."""
    rank = min(rank, *weight.shape)
    width = rank + _OVERSAMPLING
    if min(weight.shape) <= max(_LARGEST_EXACT, 2 * width):
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    start = np.random.default_rng(_SEED).standard_normal((weight.shape[1], width), np.float32)
    basis = np.linalg.qr(weight @ start)[0]
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(weight @ np.linalg.qr(weight.T @ basis)[0])[0]
    u, s, vt = np.linalg.svd(basis.T @ weight, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vt[:rank]


def _weight(layer: nn.Module) -> np.ndarray:
    weight = quantization.expand_weight(layer, mx.float32) if "scales" in layer else layer.weight.astype(mx.float32)
    return np.array(weight)


def with_start(name: str, layer: PissaLinear, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the arrays of the plain LoRA that computes what `layer` does with the factors in `tensors`: [A, A0] and
    [B; -B0]."""
    a0, b0 = (np.array(array.astype(mx.float32)) for array in layer.exact_start)
    a, b = (tensors[f"{name}.{factor}"].array() for factor in ("lora_a", "lora_b"))
    return {
        f"{name}.lora_a": Tensor.of(np.concatenate([a, a0], axis=1), "F32"),
        f"{name}.lora_b": Tensor.of(np.concatenate([b, -b0], axis=0), "F32"),
    }


def split_start(name: str, layer: PissaLinear, stored: Mapping[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Set the start of `layer` from the arrays of `with_start`, and return its factors; nothing of other shapes."""
    a, b = stored.get(f"{name}.lora_a"), stored.get(f"{name}.lora_b")
    inputs, rank = layer.lora_a.shape
    if a is None or b is None or a.shape != (inputs, 2 * rank) or b.shape != (2 * rank, layer.lora_b.shape[1]):
        return {}
    layer.set_start(mx.contiguous(a[:, rank:]), -b[rank:], dtype)
    return {f"{name}.lora_a": mx.contiguous(a[:, :rank]), f"{name}.lora_b": mx.contiguous(b[:rank])}
