"""Training by stock mlx-lm on tiny random models: the reference of the tests in this folder."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from tests.architectures.configs import ROW_LENGTH, VOCABULARY, tiny_config

ADAPTED_BLOCKS = 3
LEARNING_RATE = 1e-2
LORA = {"rank": 2, "scale": 4.0, "dropout": 0.0}


def build_model(name: str, seed: int = 0) -> nn.Module:
    """Return a float32 model of mlx_lm.models.`name`, a function of `seed`.

    What is initialized as zeros or ones differs from them, so that no part can be left out unnoticed.
    """
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(tiny_config(name)))
    model.update(tree_map(_disturbed, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def _disturbed(array: mx.array) -> mx.array:
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    return array.astype(mx.float32) + 0.02 * mx.random.normal(array.shape)


def build_rows(count: int = 4, length: int = ROW_LENGTH, seed: int = 1) -> mx.array:
    """Return (count, length) random token ids above 0."""
    return mx.random.randint(1, VOCABULARY, (count, length), key=mx.random.key(seed))


def train(model: nn.Module, rows: mx.array, updates: int = 4) -> tuple[list[float], dict[str, mx.array]]:
    """Train LoRA factors on `rows`, all in each update, as stock mlx-lm does.

    Returns:
        The loss before each update, and the adapter after the last.
    """
    model.freeze()
    mx.random.seed(2)
    linear_to_lora_layers(model, ADAPTED_BLOCKS, dict(LORA))
    model.train()
    lengths = mx.array([[0, rows.shape[1] - 1]] * len(rows))
    optimizer = optim.Adam(LEARNING_RATE, bias_correction=True)
    losses: list[float] = []
    step: Any = nn.value_and_grad(model, default_loss)
    for _ in range(updates):
        (loss, _), grads = step(model, rows, lengths)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state, loss)
        losses.append(loss.item())
    return losses, dict(tree_flatten(model.trainable_parameters()))
