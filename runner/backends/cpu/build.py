"""An engine for a model, where there can be one and it gives the model's own loss and gradients."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from runner.backends.cpu.block import view
from runner.backends.cpu.engine import Engine
from runner.backends.cpu.ops import Ops
from runner.models.device import on_cpu
from runner.models.forward import Forward
from runner.models.lora import Params
from runner.training.loss import loss_and_grads

TOLERANCE = 1e-3
"""Largest relative difference: of the loss, and of each gradient by its norm. Float32 noise is a hundredth of it."""


def fits(forward: Forward) -> bool:
    """Whether every part of `forward`'s model is written out in the engine; dropout, which is not, aside."""
    try:
        Engine(forward.model)
    except (TypeError, AttributeError):
        return False
    return True


def make_engine(
    forward: Forward, *, recompute: bool = False, proven: bool = False, ops: Ops | None = None
) -> tuple[Engine | None, str]:
    """The engine of `forward`'s model, which carries its adapter; or None, and why. `proven`: that it gives the model's
    own gradients is known."""
    if not on_cpu():
        return None, "this is no CPU"
    try:
        engine = Engine(forward.model, recompute=recompute, piece=forward.piece, ops=ops)
    except (TypeError, AttributeError) as error:
        return None, f"this model has a part that is not written out: {error}"
    return (engine, "") if proven or _agrees(engine, forward) else (None, "it does not give this model's own gradients")


def _agrees(engine: Engine, forward: Forward) -> bool:
    model = forward.model
    own = dict(tree_flatten(model.trainable_parameters()))
    keys = mx.random.split(mx.random.key(0), max(1, len(own)))
    params = {  # B starts at zero, where the gradient of A is zero as well
        name: mx.random.normal(array.shape, scale=0.02, key=key) if name.endswith("lora_b") else array
        for (name, array), key in zip(own.items(), keys, strict=False)
    }
    # Ids from all of the vocabulary: the first ones are often special tokens that the model has never learned.
    words = len(engine.embedding)
    inputs = (np.arange(1, 9, dtype=np.int32) * max(1, words // 9) % words)[None]
    # Half of the threads have nothing to predict, the others several pieces.
    positions, weights = np.arange(8, dtype=np.int32), ((np.arange(8) > 3) & (np.arange(8) < 7)).astype(np.float32)
    rest = positions, inputs[0], weights

    def place(params: Params) -> None:
        model.update(tree_unflatten(list(params.items())))

    training, least, piece = model.training, engine.lanes.least, engine.head.piece
    try:
        model.eval()
        theirs, their_grads = loss_and_grads(forward, place, params, *map(mx.array, (inputs, *rest)))
        mx.eval(theirs, their_grads)
        engine.lanes.least, engine.head.piece = 1, 2
        ours, our_grads = engine.loss_and_grads({name: view(a) for name, a in params.items()}, inputs[0], [8], *rest)
    except (ValueError, AssertionError, KeyError):  # other shapes than the engine takes
        return False
    finally:
        engine.lanes.least, engine.head.piece = least, piece
        place(own)
        model.train(training)
    if set(our_grads) != set(their_grads) or not math.isclose(ours, float(view(theirs)), rel_tol=TOLERANCE):
        return False
    return all(
        our_grads[name].shape == grad.shape
        and np.linalg.norm(our_grads[name] - view(grad)) <= TOLERANCE * np.linalg.norm(view(grad))
        for name, grad in their_grads.items()
    )
