"""Comparison of the gradients that training computes with those of the whole model, once, on one short row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from runner.backends.mlx.backend import MlxBackend
from runner.backends.mlx.loss import cross_entropy
from runner.backends.protocol import BackendBatch
from runner.data.batch import Batch
from runner.models.lora import AdaptedModel, Params
from runner.models.split_probe import SHORT, float_dtype, token_row
from runner.models.stand_in import stand_in

_TOLERANCE = {mx.float32: 1e-3, mx.float16: 2e-2, mx.bfloat16: 1e-1}
"""Largest difference of a gradient, relative to its norm."""
_NEGLIGIBLE = 1e-3
"""Gradients below this share of the largest one are compared with that share of it."""


class GradientProbe:
    """The gradients of the whole model by MLX's own differentiation, without the runner's parts."""

    def __init__(self, adapted: AdaptedModel) -> None:
        """Compute them. Raises whatever MLX raises where the model has no gradients."""
        self._adapted, model = adapted, adapted.model
        self._initial, self._params, self._key = adapted.params(), adapted.probe_params(), mx.random.key(0)
        blocks, called = list(model.layers), set[int]()
        logits = model(token_row(1, 2))  # not evaluated
        vocabulary, self._tolerance = logits.shape[-1], _TOLERANCE[float_dtype(logits)]
        self._batch = batch = _batch_of(np.array(token_row(SHORT + 1, vocabulary)))
        ids, positions, targets, weights = map(mx.array, (batch.inputs, batch.positions, batch.targets, batch.weights))

        def record(index: int, own_call: Callable, *args: Any, **kwargs: Any) -> Any:
            called.add(index)
            return own_call(*args, **kwargs)

        def loss(params: Params) -> mx.array:
            adapted.place(params)
            adapted.dropout.set_key(self._key)
            logits = model(ids).astype(mx.float32)
            return cross_entropy(logits.reshape(-1, logits.shape[-1])[positions], targets, weights)

        with self._in_training(), stand_in(blocks, record):
            self._loss, self._grads = mx.value_and_grad(loss)(self._params)
            mx.eval(self._loss, self._grads)
        self.calls_blocks = called == set(range(len(blocks)))
        """Whether each block is called as a module, so that its activations can be recomputed."""

    def agrees(self, backend: MlxBackend) -> bool:
        """Return whether `backend` gives the loss and the gradients of the whole model."""
        hidden = backend.run_frozen_blocks(self._batch.inputs) if backend.split_model.frozen_blocks else None
        with self._in_training():
            loss, grads = backend.loss_and_grads(self._params, BackendBatch(self._batch, hidden), self._key)
            mx.eval(loss, grads)
        return self._close(loss, grads)

    def can_compile(self, backend: MlxBackend) -> bool:
        """Return whether the step of `backend`, which is to be compiled, can be traced; nothing is compiled yet."""
        try:
            with self._in_training():
                backend.loss_and_grads(self._params, BackendBatch(self._batch), self._key)
        except (ValueError, RuntimeError):  # an array was evaluated while it was traced
            return False
        return True

    def _close(self, loss: mx.array, grads: Params) -> bool:
        if set(grads) != set(self._grads):
            return False
        if abs(float(loss - self._loss)) > self._tolerance * abs(float(self._loss)):
            return False
        norms = {name: float(mx.linalg.norm(grad)) for name, grad in self._grads.items()}
        floor = _NEGLIGIBLE * max(norms.values())
        return all(
            float(mx.linalg.norm(grads[name] - grad)) <= self._tolerance * max(norms[name], floor)
            for name, grad in self._grads.items()
        )

    @contextmanager
    def _in_training(self) -> Iterator[None]:
        """Put the model into training mode; its parameters, mode and dropout are restored afterwards."""
        model = self._adapted.model
        training = model.training
        model.train()
        try:
            yield
        finally:
            self._adapted.dropout.set_key(None)
            # Not `place`, which casts: these are the weights that training starts from.
            model.update(tree_unflatten(list(self._initial.items())))
            model.train(training)


def _batch_of(row: np.ndarray) -> Batch:
    """Return the batch of one row (1, length) whose second half is supervised."""
    inputs, targets = row[:, :-1], row[0, 1:]
    positions = np.arange(len(targets), dtype=np.int32)
    weights = (positions >= len(targets) // 2).astype(np.float32)
    return Batch(inputs, positions, targets, weights, int(weights.sum()), np.array([len(targets)]), np.arange(1))
