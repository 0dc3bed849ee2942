"""The operations that a function of MLX arrays would compute: traced on shapes, with nothing computed or allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class TracedArray:
    """An array of a graph: its name there, its shape and the bytes of an element."""

    name: str
    shape: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True, slots=True)
class Operation:
    """A primitive of MLX with its inputs and outputs."""

    name: str
    arguments: Sequence[Any]
    inputs: tuple[TracedArray, ...]
    outputs: tuple[TracedArray, ...]


@dataclass
class Graph:
    """A traced function. `operations` are in an order in which they can be computed."""

    inputs: list[TracedArray] = field(default_factory=list)
    outputs: list[TracedArray] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


def trace(function: Callable[..., Sequence[mx.array]], *arrays: mx.array) -> Graph:
    """Return the graph of `function(*arrays)`, which returns a list of arrays and must not evaluate any.

    MLX builds it as for `mx.compile`, from the shapes of `arrays` alone, for the default device: the fused kernels of a
    GPU are single operations there, and several on a CPU.
    """
    graph = Graph()

    def record(part: dict[str, Any]) -> None:
        kind = part["type"]
        if kind == "inputs":
            graph.inputs = _arrays(part["inputs"])
        elif kind == "outputs":
            graph.outputs = _arrays(part["outputs"])
        elif kind == "primitive":
            inputs, outputs = tuple(_arrays(part["inputs"])), tuple(_arrays(part["outputs"]))
            graph.operations.append(Operation(part["name"], part["arguments"], inputs, outputs))

    with _traceable_experts():
        mx.export_function(record, function, *arrays)
    return graph


@contextmanager
def _traceable_experts() -> Iterator[None]:
    """Let products with experts (`mx.gather_mm`) have gradients of the weights that can be traced.

    MLX's own use an operation that it cannot export. Here the gradient comes from a slice of the weights that is added
    with a factor of zero, and is an array of the same shape.
    """
    own = mx.gather_mm

    def gather_mm(a: mx.array, b: mx.array, /, *args: Any, **kwargs: Any) -> mx.array:
        return own(a, mx.stop_gradient(b), *args, **kwargs) + 0 * b[:1, :1, :1].reshape(())

    mx.gather_mm = gather_mm
    try:
        yield
    finally:
        mx.gather_mm = own


def _arrays(entries: Sequence[tuple[str, tuple[int, ...], mx.Dtype]]) -> list[TracedArray]:
    return [TracedArray(name, tuple(shape), dtype.size) for name, shape, dtype in entries]
