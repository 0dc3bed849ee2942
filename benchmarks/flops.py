"""The floating-point operations that training needs, and the peak of this machine: ``python -m benchmarks.flops``.

Only what no implementation can avoid is counted: real tokens, the head at supervised tokens, the frozen blocks once
per row. A product with a weight takes 2 operations per weight and position in the forward pass, 2 more in the backward
pass where a gradient flows through it, and, for a weight of the adapter, 2 more for its own gradient. Products of
attention (queries with keys, weights with values), norms and activations are not counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The dimensions of a llama-like model with an adapter on every linear layer of its last `trained` blocks."""

    layers: int
    hidden: int
    inner: int
    """Width of the MLP's hidden layer."""
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together, and of all value heads."""
    vocabulary: int
    rank: int
    trained: int

    @classmethod
    def of(cls, config: Mapping[str, Any], *, rank: int, num_layers: int) -> Shape:
        """From a model's config.json."""
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            queries=head * config["num_attention_heads"],
            keys=head * config["num_key_value_heads"],
            vocabulary=config["vocab_size"],
            rank=rank,
            trained=min(num_layers, config["num_hidden_layers"]),
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of a block."""
        return {
            "q": (self.hidden, self.queries),
            "k": (self.hidden, self.keys),
            "v": (self.hidden, self.keys),
            "o": (self.queries, self.hidden),
            "gate": (self.hidden, self.inner),
            "up": (self.hidden, self.inner),
            "down": (self.inner, self.hidden),
        }


@dataclass(frozen=True)
class Costs:
    """Operations per position."""

    trunk: int
    """Forward pass through embedding and frozen blocks: once per row, since their output does not change."""
    forward: int
    """Forward pass through the trained blocks and their adapters."""
    backward: int
    """Backward pass through these, with the gradients of the adapters."""
    head: int
    """Forward pass through the head, and as much again for the backward pass, at each supervised token."""


def costs(shape: Shape) -> Costs:
    """Return the operations per position of each part of the computation."""
    sizes = shape.linears()
    block = sum(i * o for i, o in sizes.values())
    adapter = shape.rank * sum(i + o for i, o in sizes.values())
    # Nothing is trained below the first trained block: no gradient flows to the input of its q, k and v, nor through
    # the A of their adapters.
    first = [sizes[name] for name in "qkv"]
    unneeded = sum(i * o for i, o in first) + shape.rank * sum(i for i, _ in first)
    through = shape.trained * (block + adapter) - (unneeded if shape.trained else 0)
    return Costs(
        trunk=2 * (shape.layers - shape.trained) * block,
        forward=2 * shape.trained * (block + adapter),
        backward=2 * through + 2 * shape.trained * adapter,
        head=2 * shape.vocabulary * shape.hidden,
    )


def training(shape: Shape, *, tokens: int, first: int, supervised: int) -> int:
    """Return the operations to train on `tokens` positions, `first` of them in rows of the first epoch."""
    cost = costs(shape)
    return first * cost.trunk + tokens * (cost.forward + cost.backward) + 2 * supervised * cost.head


def evaluating(shape: Shape, *, tokens: int, supervised: int, times: int) -> int:
    """Return the operations of `times` evaluations of the same `tokens` positions."""
    cost = costs(shape)
    return tokens * cost.trunk + times * (tokens * cost.forward + supervised * cost.head)


def peak(seconds: float = 4.0) -> dict[str, Any]:
    """Return the fastest float32 product of square matrices within `seconds`, in GFLOP/s, and the BLAS used."""
    from runner.backends import blas

    report = blas.load_blas()
    import mlx.core as mx

    best, end = 0.0, time.perf_counter() + seconds
    pairs = [(n, mx.random.normal((n, n)), mx.random.normal((n, n))) for n in (512, 1024, 2048)]
    mx.eval(pairs)
    while time.perf_counter() < end:
        for n, left, right in pairs:
            begun = time.perf_counter()
            mx.eval(left @ right)
            best = max(best, 2 * n**3 / (time.perf_counter() - begun) / 1e9)
    return {"gflops": round(best, 1), "blas": asdict(report)}


if __name__ == "__main__":
    print(json.dumps(peak()))
