"""The peak memory of evaluating a graph, found by replaying how MLX allocates and frees: nothing is computed.

What decides the peak, as in MLX's `transforms.cpp`, `array.cpp` and `backend/*/eval.cpp`:

- The order: breadth first from the outputs, at most 20 arrays wide, then reversed.
- Views: reshaping, transposing, slicing and broadcasting share the buffer of their input while its strides allow it.
- Donation: an elementwise operation writes into an input that nothing else refers to.
- Running ahead: an array is allocated when its operation is submitted, and an input is freed when its operation has
  been executed. Submission is up to ten tasks ahead of execution. On the CPU a task is ten dispatches; on a GPU it is a
  command buffer, which ends after a number of operations or of megabytes.

The backward pass of attention is part of the graph: on the CPU the weights of attention (batch, heads, length, length)
are arrays of it, while Metal and CUDA have a fused kernel that stores no such matrix, for the mask "causal" alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from runner.backends.mlx.graph import Graph, Operation, TracedArray

_MAX_WIDTH = 20
_MAX_TASKS = 10
_DISPATCHES_PER_TASK = 10


@dataclass(frozen=True)
class Pace:
    """How far submission runs ahead of execution: what ends a task."""

    cost: int = 2
    """Dispatches of an operation that computes something; one that does not has one."""
    dispatches: int = _DISPATCHES_PER_TASK
    """Dispatches of a task."""
    megabytes: float = math.inf
    """Megabytes of inputs and outputs after which a task ends."""


CPU_PACE = Pace(cost=4)
GPU_PACE = Pace(cost=1, dispatches=40, megabytes=40)
"""Of Metal's command buffers on most chips: 40 operations or 40 MB (20 operations on a phone, 50 on a Max or Ultra)."""


@dataclass(frozen=True)
class EvaluationPeak:
    """Bytes of what an evaluation allocated and had not freed at its peak."""

    logits: int
    """Arrays with a dimension as large as the vocabulary."""
    other: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.logits + self.other


class _Buffer:
    __slots__ = ("holders", "is_logits", "size")

    def __init__(self, size: int, is_logits: bool) -> None:
        self.size, self.is_logits, self.holders = size, is_logits, 0


class _Array:
    """An array with its strides in elements; `uses`: references by operations that have not run."""

    __slots__ = ("buffer", "data_size", "dense", "itemsize", "row", "shape", "size", "strides", "uses")

    def __init__(
        self,
        shape: tuple[int, ...],
        itemsize: int,
        buffer: _Buffer,
        strides: tuple[int, ...] | None = None,
        data_size: int | None = None,
        dense: bool = True,
    ) -> None:
        self.shape, self.itemsize, self.buffer = shape, itemsize, buffer
        self.size = math.prod(shape)
        self.strides = _row_major(shape) if strides is None else strides
        self.data_size = self.size if data_size is None else data_size
        self.dense = dense
        """Whether the elements fill their part of the buffer without gaps or repetition, in any order."""
        self.row = strides is None or (dense and _is_row_major(shape, self.strides))
        self.uses = 0


def evaluation_peak(
    graph: Graph, pace: Pace, *, freed: Collection[str] = (), vocabulary: int | None = None
) -> EvaluationPeak:
    """Return the peak of evaluating the outputs of `graph`; its inputs are not counted, except those named in `freed`.

    Args:
        pace: see `Pace`.
        freed: names of inputs that nothing else refers to, so that they are freed after their last use.
        vocabulary: the size by which logits are told apart.
    """
    return _Evaluation(graph, pace, frozenset(freed), vocabulary).run()


class _Evaluation:
    def __init__(self, graph: Graph, pace: Pace, freed: frozenset[str], vocabulary: int | None) -> None:
        self._pace, self._vocabulary = pace, vocabulary
        self._graph = graph
        self._live = [0, 0]  # bytes: other, logits
        self._peak = (0, 0)
        self._arrays: dict[str, _Array] = {}
        # Tasks that were submitted but not executed, each with the buffers that it holds; the last one is not full.
        self._tasks: deque[list[_Buffer]] = deque([[]])
        self._dispatches, self._bytes = 0, 0
        producers = {array.name: op for op in graph.operations for array in op.outputs}
        self._order = _evaluation_order(graph.outputs, producers)
        kept = [array.name for array in graph.outputs]
        for array in graph.inputs:
            self._arrays[array.name] = _Array(array.shape, array.itemsize, self._input_buffer(array, freed))
        self._uses: dict[str, int] = {}
        for op in self._order:
            for array in op.inputs:
                self._uses[array.name] = self._uses.get(array.name, 0) + 1
        for name in kept:
            self._uses[name] = self._uses.get(name, 0) + 1
        for name, known in self._arrays.items():
            known.uses = self._uses.get(name, 0) + (name not in freed)
            known.buffer.holders += 1

    def run(self) -> EvaluationPeak:
        for op in self._order:
            self._evaluate(op)
        other, logits = self._peak
        return EvaluationPeak(logits, other)

    def _input_buffer(self, array: TracedArray, freed: frozenset[str]) -> _Buffer:
        counted = array.name in freed
        return self._allocate(math.prod(array.shape) * array.itemsize if counted else 0, array.shape)

    def _allocate(self, size: int, shape: Sequence[int]) -> _Buffer:
        buffer = _Buffer(size, self._vocabulary in shape)
        self._live[buffer.is_logits] += size
        if sum(self._live) > sum(self._peak):
            self._peak = (self._live[0], self._live[1])
        return buffer

    def _release(self, buffer: _Buffer) -> None:
        buffer.holders -= 1
        if buffer.holders == 0:
            self._live[buffer.is_logits] -= buffer.size

    def _evaluate(self, op: Operation) -> None:
        inputs = [self._input(array) for array in op.inputs]
        temporaries: list[_Buffer] = []
        outputs = self._outputs(op, inputs, temporaries)
        for traced, output in zip(op.outputs, outputs, strict=True):
            output.uses = self._uses.get(traced.name, 0)
            output.buffer.holders += 1
            self._arrays[traced.name] = output
        own = outputs[0].buffer
        held = {id(a.buffer): a.buffer for a in (*inputs, *outputs[1:]) if a.buffer is not own}
        for buffer in (*held.values(), *temporaries):
            buffer.holders += 1
            self._tasks[-1].append(buffer)
        for traced in op.inputs:
            self._use(traced.name)
        for traced, output in zip(op.outputs, outputs, strict=True):
            if output.uses == 0:  # a sibling that nothing reads
                output.uses = 1
                self._use(traced.name)
        is_view = all(output.buffer in [a.buffer for a in inputs] for output in outputs) and not temporaries
        self._dispatch(1 if is_view else self._pace.cost, sum(a.size * a.itemsize for a in (*inputs, *outputs)))

    def _input(self, traced: TracedArray) -> _Array:
        array = self._arrays.get(traced.name)
        if array is None:  # a constant
            array = self._arrays[traced.name] = _Array(traced.shape, traced.itemsize, _Buffer(0, False))
            array.uses = self._uses[traced.name] + 1
            array.buffer.holders += 1
        return array

    def _use(self, name: str) -> None:
        array = self._arrays[name]
        array.uses -= 1
        if array.uses == 0:
            del self._arrays[name]
            self._release(array.buffer)

    def _dispatch(self, count: int, size: int) -> None:
        self._dispatches += count
        self._bytes += size
        if self._dispatches >= self._pace.dispatches or self._bytes / 1e6 > self._pace.megabytes:
            self._dispatches, self._bytes = 0, 0
            self._tasks.append([])
            if len(self._tasks) - 1 > _MAX_TASKS:
                for buffer in self._tasks.popleft():
                    self._release(buffer)

    def _outputs(self, op: Operation, inputs: list[_Array], temporaries: list[_Buffer]) -> list[_Array]:
        """Return the outputs, in buffers of inputs or in new ones."""
        name, traced = op.name, op.outputs
        if name == "Depends":
            return [_view(array, array.shape, array.strides, array) for array in inputs[: len(traced)]]
        if name == "CustomTransforms":
            return [_view(array, array.shape, array.strides, array) for array in inputs[len(inputs) - len(traced) :]]
        if name == "Split":
            return [_slice_view(inputs[0], out.shape, inputs[0].strides) for out in traced]
        if len(traced) > 1:
            return [self._new(out) for out in traced]
        out = traced[0]
        if inputs and (view := _as_view(op, inputs[0], out)):
            return [view]
        if name in _ELEMENTWISE or name in _COPYING or name.startswith("Compiled"):
            return [self._elementwise(op, inputs, out)]
        if name in _ROWWISE_IN_PLACE and self._is_donatable(op.inputs[0], inputs[0], out) and inputs[0].row:
            return [_Array(out.shape, out.itemsize, inputs[0].buffer)]
        if name in _MATRIX_PRODUCTS:
            for array in inputs[:2]:
                if not _is_matrix(array):
                    temporaries.append(self._allocate(array.size * array.itemsize, array.shape))
        return [self._new(out)]

    def _elementwise(self, op: Operation, inputs: list[_Array], out: TracedArray) -> _Array:
        """Return the output: in the layout of the inputs where they have the same one, else in rows."""
        size = math.prod(out.shape)
        full = [i for i, a in enumerate(inputs) if a.data_size != 1 or size == 1]
        layouts = {inputs[i].strides for i in full if inputs[i].dense and inputs[i].size == size}
        same = len(layouts) == 1 and all(inputs[i].dense and inputs[i].size == size for i in full)
        strides = next(iter(layouts)) if same else None
        candidates = full[:1] if op.name in _COPYING else full
        for i in candidates:
            usable = inputs[i].dense if same else inputs[i].row
            if usable and inputs[i].size == size and self._is_donatable(op.inputs[i], inputs[i], out):
                return _Array(out.shape, out.itemsize, inputs[i].buffer, strides)
        if not full:  # every input is one element
            return _Array(out.shape, out.itemsize, self._allocate(out.itemsize, ()), (0,) * len(out.shape), 1)
        array = self._new(out)
        if strides is not None:
            array = _Array(out.shape, out.itemsize, array.buffer, strides)
        return array

    def _is_donatable(self, traced: TracedArray, array: _Array, out: TracedArray) -> bool:
        fits = array.itemsize == out.itemsize and array.buffer.size <= array.size * array.itemsize + 16384
        return fits and array.uses == 1 and array.buffer.holders == 1 and array.buffer.size > 0

    def _new(self, out: TracedArray) -> _Array:
        return _Array(out.shape, out.itemsize, self._allocate(math.prod(out.shape) * out.itemsize, out.shape))


_SAME = frozenset({"Copy", "StopGradient", "View"})
_RESHAPES = frozenset({"Reshape", "Flatten", "Unflatten"})
_ELEMENTWISE = frozenset(
    """Abs Add ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTan2 ArcTanh AsType BitwiseBinary BitwiseInvert Ceil Cos Cosh
    Divide Equal Erf ErfInv Exp Expm1 Floor Greater GreaterEqual Less LessEqual Log Log1p LogAddExp LogicalAnd
    LogicalNot LogicalOr Maximum Minimum Multiply Negative NotEqual Power Remainder Round Select Sigmoid Sign Sin Sinh
    Sqrt Square Subtract Tan Tanh""".split()  # noqa: SIM905
)
_COPYING = frozenset({"SliceUpdate", "DynamicSliceUpdate", "Scatter", "ScatterAxis"})
"""They copy their first input, or write into it if it is theirs."""
_ROWWISE_IN_PLACE = frozenset({"Softmax", "RMSNorm", "LayerNorm", "RoPE"})
_MATRIX_PRODUCTS = frozenset({"Matmul", "AddMM", "QuantizedMatmul", "GatherMM", "GatherQMM"})


def _as_view(op: Operation, array: _Array, out: TracedArray) -> _Array | None:
    """Return the output of an operation that only looks at its input in another way; None if it computes."""
    name = op.name
    if name in _SAME or (name == "Contiguous" and array.row):
        return _view(array, out.shape, array.strides if out.shape == array.shape else None, array)
    if name == "Broadcast":
        added = len(out.shape) - len(array.shape)
        strides = tuple(
            0 if i < added or array.shape[i - added] != size else array.strides[i - added]
            for i, size in enumerate(out.shape)
        )
        return _Array(
            out.shape, out.itemsize, array.buffer, strides, array.data_size, array.size == math.prod(out.shape)
        )
    if name == "Transpose":
        axes = op.arguments[0]
        return _view(array, out.shape, tuple(array.strides[axis] for axis in axes), array)
    if name in ("ExpandDims", "Squeeze"):
        kept = iter([s for s, size in zip(array.strides, array.shape, strict=True) if size != 1])
        return _view(array, out.shape, tuple(next(kept) if size != 1 else 1 for size in out.shape), array)
    if name in _RESHAPES:
        reshaped = _reshaped_strides(array, out.shape)
        return None if reshaped is None else _view(array, out.shape, reshaped, array)
    if name == "Slice":
        steps = op.arguments[2] if len(op.arguments) > 2 else [1] * len(out.shape)
        strides = tuple(stride * step for stride, step in zip(array.strides, steps, strict=True))
        return _slice_view(array, out.shape, strides)
    if name == "AsStrided":
        return _Array(out.shape, out.itemsize, array.buffer, tuple(op.arguments[1]), dense=False)
    return None


def _view(array: _Array, shape: tuple[int, ...], strides: tuple[int, ...] | None, like: _Array) -> _Array:
    return _Array(shape, array.itemsize, array.buffer, strides, like.data_size, like.dense)


def _slice_view(array: _Array, shape: tuple[int, ...], strides: tuple[int, ...]) -> _Array:
    size = math.prod(shape)
    span = 1 + sum((n - 1) * abs(s) for n, s in zip(shape, strides, strict=True)) if size else 0
    return _Array(shape, array.itemsize, array.buffer, strides, size, array.dense and span == size)


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    return all(
        size == 1 or stride == wanted for size, stride, wanted in zip(shape, strides, _row_major(shape), strict=True)
    )


def _reshaped_strides(array: _Array, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the strides of a reshaped view, or None where the elements have to be copied (MLX's prepare_reshape)."""
    if array.row or array.size == 0:
        return _row_major(shape)
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(array.shape, array.strides, strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    result: list[int] = []
    j = 0
    for size in shape:
        if j < len(sizes) and sizes[j] % size == 0:
            sizes[j] //= size
            result.append(sizes[j] * strides[j])
            j += sizes[j] == 1
        elif size == 1:
            result.append(result[-1] if result else 1)
        else:
            return None
    return tuple(result)


def _is_matrix(array: _Array) -> bool:
    """Return whether the last two dimensions are rows or columns without gaps, as BLAS reads them here."""
    if len(array.shape) < 2:
        return True
    (rows, columns), (row, column) = array.shape[-2:], array.strides[-2:]
    by_row = (column == 1 or columns == 1) and (row == columns or rows == 1)
    by_column = (row == 1 or rows == 1) and (column == rows or columns == 1)
    return by_row or by_column


def _evaluation_order(outputs: Iterable[TracedArray], producers: dict[str, Operation]) -> list[Operation]:
    """Return the operations in the order in which MLX evaluates them (`eval_impl` of transforms.cpp)."""
    roots = [producers[array.name] for array in outputs if array.name in producers]
    sources = {id(op): [producers[a.name] for a in op.inputs if a.name in producers] for op in producers.values()}
    degree: dict[int, int] = {}
    stack = [iter(roots)]
    while stack:
        op = next(stack[-1], None)
        if op is None:
            stack.pop()
            continue
        if id(op) in degree:
            degree[id(op)] += 1
        else:
            degree[id(op)] = 1
            stack.append(iter(sources[id(op)]))
    tape: list[Operation | None] = [None]  # None: what waits for all outputs
    deferred: list[tuple[Operation | None, int]] = []
    i = 0
    while degree and (i < len(tape) or deferred):
        if i >= len(tape):
            current, start = deferred.pop()
        else:
            current, start = tape[i], 0
            i += 1
        inputs = roots if current is None else sources[id(current)]
        for j in range(start, len(inputs)):
            if len(tape) - i >= _MAX_WIDTH:
                deferred.append((current, j))
                break
            op = inputs[j]
            if id(op) not in degree:
                continue
            degree[id(op)] -= 1
            if degree[id(op)] == 0:
                del degree[id(op)]
                tape.append(op)
    return [op for op in reversed(tape) if op is not None]
