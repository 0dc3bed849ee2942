"""Comparison of the CPU engine with MLX's own differentiation, before the engine is used."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from runner.backends.cpu.engine import Engine
from runner.backends.cpu.linear import as_numpy
from runner.backends.cpu.partitions import PackedBatch, PackedRows
from runner.backends.mlx.loss import ChunkedLoss
from runner.models.lora import AdaptedModel
from runner.models.split_model import SplitModel

TOLERANCE = 1e-3
"""Largest relative difference of the loss, and of each gradient by its norm; float32 noise is a hundredth of it."""
_POSITIONS = 8


def agrees(engine: Engine, adapted: AdaptedModel, split_model: SplitModel) -> bool:
    """Return whether `engine` gives the loss and the gradients that MLX gives, on eight tokens."""
    model = adapted.model
    initial = dict(tree_flatten(model.trainable_parameters()))
    keys = mx.random.split(mx.random.key(0), max(1, len(initial)))
    # B starts at zero, where the gradient of A is zero as well. A large one would make the model's activations so wild
    # that float32 noise alone exceeds the tolerance.
    spread = 0.02 / max(1.0, adapted.lora_parameters["scale"])
    params = {
        name: mx.random.normal(array.shape, scale=spread, key=key) if name.endswith("lora_b") else array
        for (name, array), key in zip(initial.items(), keys, strict=False)
    }
    # Token ids from all of the vocabulary: the first ones are often special tokens that the model has never learned.
    vocabulary = len(engine.embedding)
    inputs = (np.arange(1, _POSITIONS + 1, dtype=np.int32) * max(1, vocabulary // 9) % vocabulary)[None]
    # One half of the threads has nothing to predict, the other several chunks.
    positions = np.arange(_POSITIONS, dtype=np.int32)
    weights = ((positions > 3) & (positions < 7)).astype(np.float32)
    batch = positions, inputs[0], weights

    loss = ChunkedLoss(split_model=split_model, chunk=engine.head.chunk, all_positions=False)
    training, min_positions, chunk = model.training, engine.partitioner.min_positions, engine.head.chunk
    try:
        model.eval()
        expected, expected_grads = loss.loss_and_grads(
            adapted.place, params, mx.array(inputs), None, *map(mx.array, batch)
        )
        mx.eval(expected, expected_grads)
        engine.partitioner.min_positions, engine.head.chunk = 1, 2
        arrays = {name: as_numpy(array) for name, array in params.items()}
        found, grads = engine.loss_and_grads(arrays, PackedBatch(inputs[0], PackedRows([_POSITIONS]), *batch))
    except (ValueError, AssertionError, KeyError):  # shapes that the engine does not accept
        return False
    finally:
        engine.partitioner.min_positions, engine.head.chunk = min_positions, chunk
        adapted.place(initial)
        model.train(training)
    if set(grads) != set(expected_grads) or not math.isclose(found, float(expected), rel_tol=TOLERANCE):
        return False
    return all(
        grads[name].shape == grad.shape
        and np.linalg.norm(grads[name] - as_numpy(grad)) <= TOLERANCE * np.linalg.norm(as_numpy(grad))
        for name, grad in expected_grads.items()
    )
