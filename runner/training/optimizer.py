"""The optimizers by name, from the settings: mlx's own, over the arrays of an adapter as a few vectors.

Each of them works element by element, so the numbers are those of array by array; and an update is some dozens of
operations, not a dozen for each of hundreds of small arrays, which costs far more than the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from runner.checkpoints.safetensors_file import Tensor
from runner.common.errors import CheckpointError
from runner.config import schema
from runner.models.arrays import to_tensors

CLASSES: dict[str, type[optim.Optimizer]] = {"adamw": optim.AdamW, "adam": optim.Adam, "sgd": optim.SGD}
FlatArrays = dict[str, mx.array]
"""Arrays of one dtype one after the other; by the dtype's name, and a number after the first."""
_VECTOR = 1 << 18
"""Elements of a vector, and those of its last array: what an update needs meanwhile is several times its size."""
_LINE = 4096
"""Elements that are summed first: one float32 sum over millions would lose digits."""


class NotFinite(Exception):
    """An array with numbers that are none, by its name."""


class FlatLayout:
    """Where each array of an adapter lies in the vectors."""

    def __init__(self, params: Mapping[str, mx.array]) -> None:
        self._shapes = {name: array.shape for name, array in params.items()}
        self.names: dict[str, list[str]] = {}
        """Of the arrays by vector."""
        sizes: dict[str, int] = {}
        for name, array in params.items():
            dtype = str(array.dtype).rpartition(".")[2]
            before = sizes.get(dtype, 0)
            number = before // _VECTOR
            self.names.setdefault(f"{dtype}.{number}" if number else dtype, []).append(name)
            sizes[dtype] = before + array.size
        self._edges = {
            key: list(accumulate(math.prod(self._shapes[name]) for name in names)) for key, names in self.names.items()
        }

    def pack(self, arrays: Mapping[str, mx.array]) -> FlatArrays:
        """Arrays with the names and shapes of the adapter's as vectors."""
        return {dtype: _joined([arrays[name] for name in names]) for dtype, names in self.names.items()}

    def pack_numbers(self, arrays: Mapping[str, np.ndarray]) -> FlatArrays:
        """The same of NumPy's arrays."""
        return {
            dtype: mx.array(np.concatenate([arrays[name].reshape(-1) for name in names]))
            for dtype, names in self.names.items()
        }

    def unpack(self, vectors: FlatArrays) -> dict[str, mx.array]:
        """The reverse of `pack`; the arrays share the memory of the vectors."""
        out = dict(pair for dtype, vector in vectors.items() for pair in self.parts(dtype, vector))
        return {name: out[name] for name in self._shapes}

    def tensors(self, vectors: FlatArrays) -> dict[str, Tensor]:
        """The parts of `vectors` as a checkpoint has them. Raises NotFinite, which names one."""
        out: dict[str, Tensor] = {}
        for dtype, whole in to_tensors(vectors).items():
            flat = whole.array()
            edges = pairwise([0, *self._edges[dtype]])
            parts = {
                name: Tensor.of(flat[start:stop].reshape(self._shapes[name]), whole.dtype)
                for name, (start, stop) in zip(self.names[dtype], edges, strict=True)
            }
            if not whole.is_finite():
                raise NotFinite(next(name for name, part in parts.items() if not part.is_finite()))
            out |= parts
        return out

    def parts(self, dtype: str, vector: mx.array) -> Iterator[tuple[str, mx.array]]:
        """Name and array of each part of the `vector` of a dtype."""
        for name, (start, stop) in zip(self.names[dtype], pairwise([0, *self._edges[dtype]]), strict=True):
            yield name, vector[start:stop].reshape(self._shapes[name])


class Optimizer:
    """One of `CLASSES` for the arrays of one adapter, with its state."""

    def __init__(self, own: optim.Optimizer, params: Mapping[str, mx.array]) -> None:
        """The state is made for `params`, at step 0."""
        self.packing, self._own = FlatLayout(params), own
        own.init(self.packing.pack(params))
        mx.eval(own.state)
        # The arrays that `update` gave, and the vectors they are parts of: saving needs no copy of them.
        self._last: tuple[Mapping[str, mx.array], FlatArrays] | None = None

    def update(self, params: Mapping[str, mx.array], grads: FlatArrays, learning_rate: float) -> dict[str, mx.array]:
        """The arrays after an update by their gradients."""
        self._own.learning_rate = learning_rate
        made = self._own.apply_gradients(grads, self.packing.pack(params))
        out = self.packing.unpack(made)
        mx.eval(out, self._own.state)
        self._last = out, made
        return out

    def tensors(self, params: Mapping[str, mx.array]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The arrays, as `update` gave them, and the state, as a checkpoint has them: views of their memory.

        Raises:
            NotFinite: a number is infinite or none; names the array.
        """
        vectors = self._last[1] if self._last and self._last[0] is params else self.packing.pack(params)
        arrays = self.packing.tensors(vectors)
        state: dict[str, Tensor] = {}
        for key, value in self._own.state.items():
            if key in self.packing.names:
                for part, vector in value.items():
                    state |= {f"{name}.{part}": t for name, t in self.packing.tensors({key: vector}).items()}
            else:
                state |= to_tensors({key: value})
                if not state[key].is_finite():
                    raise NotFinite(key)
        return arrays, state

    def state(self) -> dict[str, mx.array]:
        """The state as name to array, such as `model.layers.0.….lora_a.m`, `step`, `learning_rate`."""
        out: dict[str, mx.array] = {}
        for key, value in self._own.state.items():
            if key in self.packing.names:
                for part, vector in value.items():
                    out |= {f"{name}.{part}": array for name, array in self.packing.parts(key, vector)}
            else:
                out[key] = value
        return dict(sorted(out.items()))

    def restore(self, saved: Mapping[str, mx.array], where: str) -> None:
        """Put a saved state back.

        Raises:
            CheckpointError: names, shapes or dtypes differ from what this optimizer keeps.
        """
        now = self.state()
        if set(now) != set(saved):
            odd = sorted(set(now) ^ set(saved))
            raise CheckpointError(f"{where}: the optimizer's state has other arrays than here, such as {odd[0]}.")
        for name, array in now.items():
            if saved[name].shape != array.shape or saved[name].dtype != array.dtype:
                raise CheckpointError(
                    f"{where}: {name} is {saved[name].dtype} {saved[name].shape}, here {array.dtype} {array.shape}."
                )
        for key, value in self._own.state.items():
            if key in self.packing.names:
                names = self.packing.names[key]
                for part in value:
                    value[part] = _joined([saved[f"{name}.{part}"] for name in names])
            else:
                self._own.state[key] = saved[key]
        mx.eval(self._own.state)


def build_optimizer(settings: schema.OptimizerConfig, params: Mapping[str, mx.array]) -> Optimizer:
    """The optimizer with its state made for `params`; options come from `settings`, completed."""
    options = {name: getattr(settings, name) for name in schema.OPTIMIZERS[settings.name]}
    return Optimizer(CLASSES[settings.name](learning_rate=settings.learning_rate, **options), params)


def clip_grads(grads: FlatArrays, largest: float | None) -> tuple[FlatArrays, mx.array]:
    """Gradients scaled so that their norm is at most `largest`, as mlx.optimizers.clip_grad_norm does, and the norm
    (a scalar) before."""
    norm = mx.sqrt(sum((_squares(vector) for vector in grads.values()), mx.array(0.0)))
    if largest is None:
        return grads, norm
    scale = mx.minimum(largest / (norm + 1e-6), 1.0)
    return {dtype: (vector * scale).astype(vector.dtype) for dtype, vector in grads.items()}, norm


def _squares(vector: mx.array) -> mx.array:
    squares = mx.square(vector.astype(mx.float32))
    whole = vector.size // _LINE * _LINE
    return squares[:whole].reshape(-1, _LINE).sum(axis=1).sum() + squares[whole:].sum()


def _joined(arrays: list[mx.array]) -> mx.array:
    return mx.concatenate([array.reshape(-1) for array in arrays])
