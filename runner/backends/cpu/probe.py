"""Comparison of the CPU engine with MLX's own differentiation, before the engine is used."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from runner.backends.cpu.engine import Engine
from runner.backends.cpu.linear import as_numpy
from runner.backends.cpu.partitions import PackedBatch, PackedRows
from runner.backends.mlx.loss import ChunkedLoss
from runner.models.lora import AdaptedModel
from runner.models.split_model import SplitModel

# Float32 noise on SmolLM2, with ranks from 1 to 64 and 4, 8 or all blocks: 1.4e-5, 1.7e-4, and of one array 1.3e-3,
# where the gradient of A is small at rank 1 or 2 because its terms cancel each other.
_LOSS_TOLERANCE = 1e-4
"""Largest relative difference of the loss."""
_TOLERANCE = 1e-3
"""Largest difference of all gradients together, relative to their norm."""
_ARRAY_TOLERANCE = 5e-3
"""Largest difference of the gradient of one array, relative to its norm."""
_POSITIONS = 8


def agrees(engine: Engine, adapted: AdaptedModel, split_model: SplitModel) -> bool:
    """Return whether `engine` gives the loss and the gradients that MLX gives, on eight tokens."""
    model = adapted.model
    initial, params = adapted.params(), adapted.probe_params()
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
    if not math.isclose(found, float(expected), rel_tol=_LOSS_TOLERANCE):
        return False
    return _gradients_agree(grads, {name: as_numpy(grad) for name, grad in expected_grads.items()})


def _gradients_agree(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> bool:
    if {name: grad.shape for name, grad in found.items()} != {name: grad.shape for name, grad in expected.items()}:
        return False
    norms = np.array([np.linalg.norm(grad) for grad in expected.values()])
    errors = np.array([np.linalg.norm(found[name] - grad) for name, grad in expected.items()])
    together = np.linalg.norm(errors) <= _TOLERANCE * np.linalg.norm(norms)
    return bool(together and (errors <= _ARRAY_TOLERANCE * norms).all())
