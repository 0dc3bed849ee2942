"""The optimizers by name, from the settings: mlx's own, over a flat dict of arrays."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

from runner import config
from runner.errors import CheckpointError

CLASSES: dict[str, type[optim.Optimizer]] = {"adamw": optim.AdamW, "adam": optim.Adam, "sgd": optim.SGD}


def build(settings: config.Optimizer, params: dict[str, mx.array]) -> optim.Optimizer:
    """The optimizer with its state made for `params`; options come from `settings`, completed."""
    options = {name: getattr(settings, name) for name in config.OPTIMIZERS[settings.name]}
    made = CLASSES[settings.name](learning_rate=settings.learning_rate, **options)
    made.init(params)
    mx.eval(made.state)
    return made


def flat_state(optimizer: optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's state as name to array, such as `model.layers.0.….lora_a.m`, `step`, `learning_rate`."""
    return dict(sorted(tree_flatten(optimizer.state)))


def restore(optimizer: optim.Optimizer, params: dict[str, mx.array], saved: dict[str, mx.array], where: str) -> None:
    """Put a saved state back.

    Raises:
        CheckpointError: names, shapes or dtypes differ from what this optimizer keeps.
    """
    now = flat_state(optimizer)
    if set(now) != set(saved):
        odd = sorted(set(now) ^ set(saved))
        raise CheckpointError(f"{where}: the optimizer's state has other arrays than here, such as {odd[0]}.")
    for name, array in now.items():
        if saved[name].shape != array.shape or saved[name].dtype != array.dtype:
            raise CheckpointError(
                f"{where}: {name} is {saved[name].dtype} {saved[name].shape}, here {array.dtype} {array.shape}."
            )
    optimizer.state = tree_map_with_path(lambda path, _: saved[path], optimizer.state)
    optimizer.init(params)  # keeps what is there; without it the first update would ask again
