"""The memory of the engine's buffers for a batch: their names and sizes, as the engine asks for them.

A buffer is as large as the largest batch that used it, and the partitions of a batch divide it, except for the scratch
of attention, which each thread has for itself. So the sum over the names is the peak: nothing is freed between steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from runner.backends.cpu.block import Block
from runner.backends.cpu.engine import Engine
from runner.models.lora import Params


def buffer_sizes(
    engine: Engine,
    params: Params,
    lengths: Sequence[int] | np.ndarray,
    supervised: int,
    *,
    cached: bool,
    backward: bool = True,
    trained: bool = True,
) -> dict[str, int]:
    """Return the number of float32 values by buffer; `logits` are those of the head.

    Args:
        lengths: tokens of each row of the batch.
        supervised: its supervised tokens.
        cached: whether the hidden states after the frozen blocks are given.
        backward: whether gradients are computed.
        trained: whether the trained blocks and the head are.
    """
    n, longest = int(np.sum(lengths)), int(np.max(lengths))
    m, d = supervised, engine.embedding.shape[1]
    threads = max(1, min(engine.partitioner.threads, n // engine.partitioner.min_positions))
    sizes: dict[str, int] = {}

    def use(name: str, count: int) -> None:
        sizes[name] = max(sizes.get(name, 0), count)

    def run(block: Block, slot: str, count: int) -> None:
        for name, size in _forward(block, params, n, count, d):
            use(f"{slot}.{name}" if name in _KEPT or name.endswith(".xa") else name, size)
        scratch = threads * block.layout.group_size * block.layout.tile
        for name, columns in (("queries", block.layout.width), ("scores", longest)):
            use(name, scratch * columns * (2 if backward else 1))

    if cached:
        use("inputs", n * d)
    else:
        use("even", n * d)
        for block in engine.frozen:
            use("odd", n * d)
            run(block, "0", n)
    for i, block in enumerate(engine.trained if trained else []):
        count = m if i == len(engine.trained) - 1 else n
        keeps = backward and not engine.grad_checkpoint
        run(block, str(i) if keeps else "0", count)
        use(f"{i}.out" if backward else "odd", count * d)
        if backward:
            if engine.grad_checkpoint:
                use("recomputed", count * d)
            for name, size in _backward(block, params, n, count, d, threads):
                use(name, size)
    if trained:
        chunk = min(engine.head.chunk, m)
        use("logits", chunk * len(engine.head.weight))
        use("head", chunk * d * (2 + (threads + 1) * backward))
        if backward:
            use("grad_last", m * d)
            # Scaled copies of A; gradients of each partition, and as one vector for the optimizer.
            use("adapter", sum(array.size for array in params.values()) * (threads + 2))
    return sizes


_KEPT = ("qkv", "attended", "log_sums", "middle", "gate_up", "scale0", "scale1")
"""What the backward pass reads: one for each block, unless it is computed again."""


def _forward(block: Block, params: Params, n: int, m: int, d: int) -> Iterator[tuple[str, int]]:
    layout = block.layout
    yield "qkv", n * layout.columns
    yield "attended", n * layout.heads * layout.width
    yield "log_sums", n * layout.heads
    yield "middle", m * d
    yield "gate_up", 2 * m * block.inner
    yield "scale0", n
    yield "scale1", m
    yield "inner", m * block.inner
    yield "normed", n * d
    for name, group in zip(("qkv", "o", "gate_up", "down"), block.groups, strict=True):
        yield f"{name}.xa", (n if name == "qkv" else m) * _rank(group.linears, params)


def _backward(block: Block, params: Params, n: int, m: int, d: int, threads: int) -> Iterator[tuple[str, int]]:
    layout = block.layout
    columns = layout.heads * layout.width
    yield "grad_inner", m * block.inner
    yield "grad_normed", n * d
    yield "grad_attended", n * columns
    yield "grad_qkv", n * layout.columns
    yield "deltas", n * layout.heads
    if m < n:
        yield "grad_selected", 2 * m * columns  # with the selected heads' output
        yield "grad_x", n * d
    ranks = [(_rank(group.linears, params), group.linears[0].weight.shape[1]) for group in block.groups]
    yield "grad_xa", n * max(rank for rank, _ in ranks)
    yield "grad_a", threads * max(rank * inputs for rank, inputs in ranks)


def _rank(linears: Sequence, params: Mapping) -> int:
    factors = (params.get(f"{linear.name}.lora_a") for linear in linears)
    return sum(factor.shape[1] for factor in factors if factor is not None)
