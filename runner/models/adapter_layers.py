"""Layers of adapters that mlx-lm does not have, or not for every base: DoRA and PiSSA.

Their arrays have mlx-lm's names and shapes, so its own layers load them wherever they compute the same.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from runner.models import quantization


def row_norms_squared(layer: nn.Module) -> mx.array:
    """Return the squared norms (outputs,), float32, of the rows of the weight of a linear layer or an embedding."""
    if "scales" in layer:
        return mx.square(quantization.expand_weight(layer, mx.float32)).sum(axis=1)
    return mx.square(layer.weight.astype(mx.float32)).sum(axis=1)


def input_dims(layer: nn.Module) -> int:
    """Return the width of a row of a layer's weight, which is packed where it is quantized."""
    width: int = layer.weight.shape[-1]
    return width * 32 // layer.bits if "scales" in layer else width


class DoraLinear(nn.Module):
    """A linear layer with DoRA (Liu et al., arXiv:2402.09353): y = m / |W + s B A| (W x + s B A x) + bias.

    The norms are those of the rows, without a gradient, as in section 4.3 of the paper. They are computed from W A, so
    neither the adapted weight nor, of a quantized layer, the expanded one ever exists:
    |W + s B A|² = |W|² + 2 s (W A) B + s² B (A A) B, row by row.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, *, has_values: bool = True) -> None:
        """`has_values`: whether the weights of `linear` are there; else the magnitudes are zeros."""
        super().__init__()
        outputs, inputs = linear.weight.shape[0], input_dims(linear)
        self.linear = linear
        self.dropout = nn.Dropout(p=0.0)
        self.scale = scale
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))
        self._norms_squared = row_norms_squared(linear) if has_values else mx.zeros((outputs,))
        self.m = mx.sqrt(self._norms_squared)

    def __call__(self, x: mx.array) -> mx.array:
        """Return y (..., outputs) of x (..., inputs)."""
        bias = self.linear.bias if "bias" in self.linear else None
        y = self.linear(x)
        y = y if bias is None else y - bias
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        y = (self.m / self.norms()).astype(x.dtype) * (y + (self.scale * z).astype(x.dtype))
        return y if bias is None else y + bias

    def norms(self) -> mx.array:
        """Return the norms (outputs,) of the rows of the adapted weight, without a gradient."""
        a, b = (mx.stop_gradient(array.astype(mx.float32)) for array in (self.lora_a, self.lora_b))
        wa = self.linear(a.T)
        wa = wa - self.linear.bias if "bias" in self.linear else wa
        return _norms(self._norms_squared, wa, a.T @ a, b, self.scale)

    @property
    def base_magnitudes(self) -> mx.array:
        """The magnitudes (outputs,) with which a zero B changes nothing."""
        return mx.sqrt(self._norms_squared)

    def fuse(self) -> nn.Linear:
        """Return the linear layer, which is not quantized, with its adapter merged."""
        weight = self.linear.weight.astype(mx.float32)
        merged = weight + (self.scale * self.lora_b.T) @ self.lora_a.T
        merged = (self.m / mx.linalg.norm(merged, axis=1))[:, None] * merged
        return _replaced_weight(self.linear, merged)


class DoraEmbedding(nn.Module):
    """An embedding with DoRA on its rows, as mlx-lm's, also where it is quantized."""

    def __init__(self, embedding: nn.Module, rank: int, scale: float, *, has_values: bool = True) -> None:
        """`has_values`: whether the weights of `embedding` are there; else the magnitudes are zeros."""
        super().__init__()
        count, dims = embedding.weight.shape[0], input_dims(embedding)
        self.embedding = embedding
        self.dropout = nn.Dropout(p=0.0)
        self.scale = scale
        bound = 1 / math.sqrt(count)
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(count, rank))
        self.lora_b = mx.zeros((rank, dims))
        self._norms_squared = row_norms_squared(embedding) if has_values else mx.zeros((count,))
        self.m = mx.sqrt(self._norms_squared)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the rows (..., dims) of the token ids x (...)."""
        y = self.embedding(x)
        z = self.scale * (self.lora_a[x] @ self.lora_b)
        norms = mx.stop_gradient(mx.linalg.norm(y.astype(mx.float32) + z, axis=-1))
        return (self.m[x] / norms)[..., None].astype(y.dtype) * (y + self.dropout(z).astype(y.dtype))

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits (..., count) of x (..., dims)."""
        y = self.embedding.as_linear(x)
        z = (self.dropout(x) @ self.lora_b.T) @ self.lora_a.T
        return (self.m / self.norms()).astype(x.dtype) * (y + (self.scale * z).astype(x.dtype))

    def norms(self) -> mx.array:
        """Return the norms (count,) of the adapted rows, without a gradient."""
        a, b = (mx.stop_gradient(array.astype(mx.float32)) for array in (self.lora_a, self.lora_b))
        return _norms(self._norms_squared, self.embedding.as_linear(b), b @ b.T, a.T, self.scale)

    @property
    def base_magnitudes(self) -> mx.array:
        """The magnitudes (count,) with which a zero B changes nothing."""
        return mx.sqrt(self._norms_squared)

    def fuse(self) -> nn.Embedding:
        """Return the embedding, which is not quantized, with its adapter merged."""
        weight = self.embedding.weight.astype(mx.float32)
        merged = weight + (self.scale * self.lora_a) @ self.lora_b
        merged = (self.m / mx.linalg.norm(merged, axis=1))[:, None] * merged
        return _replaced_weight(self.embedding, merged)


class PissaLinear(nn.Module):
    """A linear layer whose factors start as the principal part of its weight (PiSSA, Meng et al., arXiv:2404.02948).

    In the paper A and B are trained on the residual W - s B0 A0, where A0 and B0 are their start. Here the base keeps
    its weight, quantized or not, and the start is subtracted beside it: y = W x + s (B A x - B0 A0 x). That is the same
    function, exactly that of the base before the first update, and a plain LoRA of twice the rank for other programs.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float) -> None:
        """The start is zero, which makes it a plain LoRA, until `set_start` is called."""
        super().__init__()
        outputs, inputs = linear.weight.shape[0], input_dims(linear)
        self.linear = linear
        self.dropout = nn.Dropout(p=0.0)
        self.scale = scale
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))
        self.set_start(mx.zeros((inputs, rank)), mx.zeros((rank, outputs)))

    def set_start(self, a: mx.array, b: mx.array, dtype: mx.Dtype = mx.float32) -> None:
        """Set A0 (inputs, rank) and B0 (rank, outputs), float32; `dtype`: that of their products."""
        self._exact_start = a, b
        # Arrays of their own, computed now: a compiled step takes none that are also its arguments, or still lazy.
        self._start_a, self._start_b = ((array * 1).astype(dtype) for array in (a, b))
        mx.eval(a, b, self._start_a, self._start_b)

    @property
    def exact_start(self) -> tuple[mx.array, mx.array]:
        """A0 and B0 in float32."""
        return self._exact_start

    def __call__(self, x: mx.array) -> mx.array:
        """Return y (..., outputs) of x (..., inputs)."""
        y = self.linear(x)
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b - (x @ self._start_a) @ self._start_b
        return y + (self.scale * z).astype(x.dtype)


def _norms(weight: mx.array, product: mx.array, gram: mx.array, factor: mx.array, scale: float) -> mx.array:
    """Return the row norms of W + s F P, from the squared norms of W, W P and P P: see `DoraLinear`.

    `product` (rank, n), `gram` (rank, rank), `factor` (rank, n).
    """
    cross = (product.astype(mx.float32) * factor).sum(axis=0)
    update = ((gram @ factor) * factor).sum(axis=0)
    # A row that the update cancels has a norm of rounding, never the root of a negative number.
    return mx.stop_gradient(mx.sqrt(mx.maximum(weight + 2 * scale * cross + scale**2 * update, 1e-12)))


def _replaced_weight(layer: nn.Module, weight: mx.array) -> nn.Module:
    """Return a layer like `layer` with another weight, in the type of its own."""
    cls: type[nn.Module] = type(layer)
    copy: nn.Module = cls.__new__(cls)  # type: ignore[call-overload]  # without random weights
    nn.Module.__init__(copy)
    copy.weight = weight.astype(layer.weight.dtype)
    if "bias" in layer:
        copy.bias = layer.bias
    return copy
