"""MLX's optimizers by name, applied to the arrays of an adapter.

An adapter has hundreds of small arrays: updating each one costs far more in operations than in arithmetic. So the
elementwise optimizers are applied to a few flat vectors, which gives the same bits as an update array by array; the
others, whose update of an element depends on the shape of its array, are applied to the arrays themselves. Arrays with
learning rates of their own (LoRA+) are in vectors of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from runner.checkpoints.safetensors_file import Tensor
from runner.common.errors import CheckpointError
from runner.config import schema
from runner.models.arrays import to_tensors

_MIN_PARAMETER_SCALE = 1e-3
"""With optimizer.scale_parameter, the least scale of Adafactor's learning rate (epsilon 2 in its paper)."""
FlatArrays = dict[str, mx.array]
"""Vectors of concatenated arrays of one dtype, by key: `float32`, then `float32.1`, … ."""
_VECTOR_SIZE = 1 << 18
"""Elements after which a new vector begins: an update needs temporary memory of several times a vector's size."""
_SUM_SIZE = 4096
"""Elements summed first: a single float32 sum over millions of elements would lose digits."""


class NonFiniteArray(Exception):
    """Raised when an array contains NaN or Inf; the message is its name."""


class Muon(optim.Muon):
    """MLX's Muon, applied to each matrix of a stack, such as those of the adapters of a mixture's experts.

    MLX's class flattens an array of three axes to one matrix, as is right for the filters of a convolution.
    """

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """Return the updated `parameter` (…, rows, columns) or (length,), and set the momentum in `state`."""
        if gradient.ndim <= 2:
            return super().apply_single(gradient, parameter, state)
        states = [{"v": v} for v in state["v"]]
        updated = [self.apply_single(*parts) for parts in zip(gradient, parameter, states, strict=True)]
        state["v"] = mx.stack([each["v"] for each in states])
        return mx.stack(updated)


CLASSES: dict[str, type[optim.Optimizer]] = {
    "adamw": optim.AdamW,
    "adam": optim.Adam,
    "sgd": optim.SGD,
    "lion": optim.Lion,
    "adafactor": optim.Adafactor,
    "muon": Muon,
}
_ELEMENTWISE = (optim.AdamW, optim.Adam, optim.SGD, optim.Lion)
"""Classes whose update of an element depends on this element alone: applied to flat vectors, all others to arrays."""


class FlatLayout:
    """The assignment of named arrays to flat vectors."""

    def __init__(self, params: Mapping[str, mx.array], lr_ratios: Mapping[str, float] | None = None) -> None:
        """`lr_ratios`: by name of an array, the factor of its learning rate where that is not 1."""
        self._shapes = {name: array.shape for name, array in params.items()}
        self.names: dict[str, list[str]] = {}
        """Names of the arrays in each vector, by the vector's key."""
        self.lr_ratios: dict[str, float] = {}
        """The factor of the learning rate of each vector."""
        sizes: dict[str, int] = {}
        for name, array in params.items():
            ratio = (lr_ratios or {}).get(name, 1.0)
            kind = str(array.dtype).rpartition(".")[2] + (f"*{ratio!r}" if ratio != 1 else "")
            number = sizes.get(kind, 0) // _VECTOR_SIZE
            key = f"{kind}.{number}" if number else kind
            self.names.setdefault(key, []).append(name)
            self.lr_ratios[key] = ratio
            sizes[kind] = sizes.get(kind, 0) + array.size
        self._offsets = {
            key: [0, *accumulate(math.prod(self._shapes[name]) for name in names)] for key, names in self.names.items()
        }

    def flatten(self, arrays: Mapping[str, mx.array] | Mapping[str, np.ndarray]) -> FlatArrays:
        """Concatenate MLX or NumPy arrays that have the layout's names and shapes."""
        return {key: _concatenate([arrays[name] for name in names]) for key, names in self.names.items()}

    def unflatten(self, vectors: FlatArrays) -> dict[str, mx.array]:
        """Split `vectors` into the named arrays, which share their memory; the inverse of `flatten`."""
        arrays = dict(pair for key, vector in vectors.items() for pair in self.split(key, vector))
        return {name: arrays[name] for name in self._shapes}

    def split(self, key: str, vector: mx.array) -> Iterator[tuple[str, mx.array]]:
        """Yield the name and the array of each part of one vector."""
        for name, (start, stop) in zip(self.names[key], pairwise(self._offsets[key]), strict=True):
            yield name, vector[start:stop].reshape(self._shapes[name])

    def tensors(self, vectors: FlatArrays) -> dict[str, Tensor]:
        """Split `vectors` into tensors for a checkpoint file, as views of their memory.

        Raises:
            NonFiniteArray: names an array with NaN or Inf.
        """
        tensors: dict[str, Tensor] = {}
        for key, whole in to_tensors(vectors).items():
            flat = whole.array()
            parts = {
                name: Tensor.of(flat[start:stop].reshape(self._shapes[name]), whole.dtype)
                for name, (start, stop) in zip(self.names[key], pairwise(self._offsets[key]), strict=True)
            }
            if not whole.is_finite():
                raise NonFiniteArray(next(name for name, part in parts.items() if not part.is_finite()))
            tensors |= parts
        return tensors


class Optimizer:
    """An MLX optimizer and its state for the arrays of one adapter."""

    def __init__(
        self,
        optimizer: optim.Optimizer,
        params: Mapping[str, mx.array],
        lr_ratios: Mapping[str, float] | None = None,
    ) -> None:
        """Initialize the state of `optimizer` for `params`, at step 0; `lr_ratios`: see `FlatLayout`."""
        self.layout = FlatLayout(params, lr_ratios)
        self._optimizer = optimizer
        self._elementwise = isinstance(optimizer, _ELEMENTWISE)
        ratios = self.layout.lr_ratios
        if not self._elementwise:
            ratios = {name: ratios[key] for key, names in self.layout.names.items() for name in names}
        self._lr_ratios = ratios
        optimizer.init(self.layout.flatten(params) if self._elementwise else dict(params))
        mx.eval(optimizer.state)
        # The arrays returned by the last update and the vectors that hold them: saving them needs no copy.
        self._last: tuple[Mapping[str, mx.array], FlatArrays] | None = None

    def update(self, params: Mapping[str, mx.array], grads: FlatArrays, learning_rate: float) -> dict[str, mx.array]:
        """Return the parameters after one update; `grads` in this optimizer's layout."""
        if self._elementwise:
            vectors = self._apply(grads, self.layout.flatten(params), learning_rate)
            updated = self.layout.unflatten(vectors)
            self._last = updated, vectors
        else:
            updated = self._apply(self.layout.unflatten(grads), params, learning_rate)
        mx.eval(updated, self._optimizer.state)
        return updated

    def _apply(
        self, grads: Mapping[str, mx.array], weights: Mapping[str, mx.array], learning_rate: float
    ) -> dict[str, mx.array]:
        """Return the vectors or arrays after one step of the optimizer, each with its own learning rate."""
        optimizer = self._optimizer
        optimizer.state["step"] = optimizer.step + 1
        updated = {}
        for key, weight in weights.items():
            optimizer.learning_rate = learning_rate * self._lr_ratios[key]
            updated[key] = optimizer.apply_single(grads[key], weight, optimizer.state[key])
        optimizer.learning_rate = learning_rate  # as it is stored in a checkpoint
        return updated

    def tensors(self, params: Mapping[str, mx.array]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return `params` and the optimizer state as tensors for checkpoint files, as views of their memory.

        Raises:
            NonFiniteArray: names an array with NaN or Inf.
        """
        vectors = self._last[1] if self._last and self._last[0] is params else self.layout.flatten(params)
        weights = self.layout.tensors(vectors)
        state: dict[str, Tensor] = {}
        for key, value in self._optimizer.state.items():
            if self._elementwise and isinstance(value, dict):
                for part, vector in value.items():
                    state |= {f"{name}.{part}": t for name, t in self.layout.tensors({key: vector}).items()}
            else:
                state |= _finite_tensors(_by_part(key, value))
        return weights, state

    def state(self) -> dict[str, mx.array]:
        """Return the state by name, such as `model.layers.0.….lora_a.m`, `step` and `learning_rate`."""
        state: dict[str, mx.array] = {}
        for key, value in self._optimizer.state.items():
            if self._elementwise and isinstance(value, dict):
                for part, vector in value.items():
                    state |= {f"{name}.{part}": array for name, array in self.layout.split(key, vector)}
            else:
                state |= _by_part(key, value)
        return dict(sorted(state.items()))

    def restore(self, saved: Mapping[str, mx.array], source: str) -> None:
        """Replace the state by a saved one; `source` is named in errors.

        Raises:
            CheckpointError: names, shapes or dtypes differ from this optimizer's.
        """
        require_same_arrays(saved, self.state(), "the optimizer state", source)
        for key, value in self._optimizer.state.items():
            if not isinstance(value, dict):
                self._optimizer.state[key] = saved[key]
                continue
            for part in value:
                names = self.layout.names[key] if self._elementwise else [key]
                arrays = [saved[f"{name}.{part}"] for name in names]
                value[part] = _concatenate(arrays) if self._elementwise else arrays[0]
        mx.eval(self._optimizer.state)


def build_optimizer(config: schema.Config, params: Mapping[str, mx.array]) -> Optimizer:
    """Build the configured optimizer for `params`, an adapter's arrays; `config` has its defaults filled in."""
    return Optimizer(_mlx_optimizer(config.optimizer), params, lr_ratios(config.lora, params))


def lr_ratios(lora: schema.LoraConfig, names: Iterable[str]) -> dict[str, float]:
    """Return the factor of the learning rate of each array that has one: of the factors B in LoRA+."""
    ratio = lora.b_lr_ratio
    return {} if ratio is None else {name: ratio for name in names if name.endswith("lora_b")}


def state_bytes(config: schema.OptimizerConfig, params: Mapping[str, mx.array]) -> int:
    """Return the size of the optimizer's state for arrays of the shapes of `params`; nothing is computed."""
    optimizer = _mlx_optimizer(config)
    optimizer.init(dict(params))
    return sum(array.nbytes for name, array in tree_flatten(optimizer.state) if name not in ("step", "learning_rate"))


def _mlx_optimizer(config: schema.OptimizerConfig) -> optim.Optimizer:
    options = {name: getattr(config, name) for name in schema.choice_options("optimizer", config.name)}
    if config.name == "adafactor":
        # The learning rate is that of the schedule, instead of min(0.01, 1 / sqrt(update)).
        options |= {
            "eps": (options["eps"], _MIN_PARAMETER_SCALE),
            "beta_1": options.pop("beta1"),
            "relative_step": False,
        }
    return CLASSES[config.name](**options)


def _by_part(key: str, value: dict[str, mx.array] | mx.array) -> dict[str, mx.array]:
    """Return an entry of an MLX optimizer's state with the names that a checkpoint has."""
    if isinstance(value, mx.array):
        return {key: value}
    return {f"{key}.{part}": array for part, array in value.items()}


def _finite_tensors(arrays: Mapping[str, mx.array]) -> dict[str, Tensor]:
    tensors = to_tensors(arrays)
    if bad := next((name for name, tensor in tensors.items() if not tensor.is_finite()), None):
        raise NonFiniteArray(bad)
    return tensors


def require_same_arrays(
    saved: Mapping[str, mx.array], current: Mapping[str, mx.array], content: str, source: str
) -> None:
    """Refuse saved arrays that differ from the run's in name, shape or dtype.

    Raises:
        CheckpointError: names `source`, `content` and the first difference.
    """
    if set(current) != set(saved):
        name = sorted(set(current) ^ set(saved))[0]
        raise CheckpointError(f"{source}: {content} has different arrays than this run, such as {name}.")
    for name, array in current.items():
        if saved[name].shape != array.shape or saved[name].dtype != array.dtype:
            raise CheckpointError(
                f"{source}: {name} is {saved[name].dtype} {saved[name].shape}, "
                f"but this run has {array.dtype} {array.shape}."
            )


def clip_grads(grads: FlatArrays, max_norm: float | None) -> tuple[FlatArrays, mx.array]:
    """Scale gradients to a global norm of at most `max_norm`, as mlx.optimizers.clip_grad_norm does.

    Returns:
        The scaled gradients and the norm before clipping, a scalar.
    """
    norm = mx.sqrt(sum((_sum_of_squares(vector) for vector in grads.values()), mx.array(0.0)))
    if max_norm is None:
        return grads, norm
    scale = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return {key: (vector * scale).astype(vector.dtype) for key, vector in grads.items()}, norm


def _sum_of_squares(vector: mx.array) -> mx.array:
    squares = mx.square(vector.astype(mx.float32))
    end = vector.size // _SUM_SIZE * _SUM_SIZE
    return squares[:end].reshape(-1, _SUM_SIZE).sum(axis=1).sum() + squares[end:].sum()


def _concatenate(arrays: Sequence[mx.array | np.ndarray]) -> mx.array:
    flat: list[Any] = [array.reshape(-1) for array in arrays]
    return mx.array(np.concatenate(flat)) if isinstance(flat[0], np.ndarray) else mx.concatenate(flat)
