"""A model that does not fit into one of the ranks' machines is refused before it is loaded: each holds all of it.

mlx-lm splits models for inference alone. `shard` replaces linear layers by ones that its `linear_to_lora_layers` does
not convert, and the stages of a `pipeline` are joined by `mx.distributed.send`, which has no gradient.
"""

from __future__ import annotations

import json
import platform
from dataclasses import replace

from mlx.utils import tree_flatten

from runner.common.errors import ConfigError, RunnerError
from runner.config.schema import Config, ModelConfig
from runner.models.device import on_cpu
from runner.models.shapes import load_shapes
from runner.training.memory_estimate import device_limit
from runner.training.world import World

_SHARE_FOR_WEIGHTS = 0.8
"""Of a machine's memory, where a model of another size is suggested: activations and the adapter need some."""
_BYTES_IN_4_BITS = 4.5 / 8
"""Of a parameter, with the scales and biases of groups of 64."""


def refuse_too_large(world: World, config: Config) -> None:
    """Refuse a model whose weights alone do not fit the machine of each rank.

    Raises:
        ConfigError: says which rank lacks how much, and what would fit there.
    """
    if world.size == 1:
        return
    weights, parameters = _size(config.model)
    own = {"weights": weights, "limit": device_limit()[0], "host": platform.node()}
    told = [json.loads(content) for content in world.gather(json.dumps(own).encode())]
    rank, smallest = min(enumerate(told), key=lambda each: each[1]["limit"] - each[1]["weights"])
    if smallest["weights"] <= smallest["limit"]:
        return
    fits = _what_fits(config.model, smallest["limit"], smallest["weights"] / max(1, parameters))
    raise ConfigError(
        f"The weights of the model take {smallest['weights'] / 1e9:.1f} GB, and rank {rank} ({smallest['host']}) has "
        f"{smallest['limit'] / 1e9:.1f} GB for a run. Every rank holds the whole model, so more of them do not help. "
        f"There would fit: {fits}. Or leave that machine out."
    )


def _size(model: ModelConfig) -> tuple[int, int]:
    """Return bytes and number of a model's weights; zeros where it cannot be read, which loading it will explain."""
    try:
        arrays = [array for _, array in tree_flatten(load_shapes(model)[0].model.parameters())]
    except RunnerError:
        return 0, 0
    return sum(array.nbytes for array in arrays), sum(array.size for array in arrays)


def _what_fits(model: ModelConfig, limit: int, bytes_each: float) -> str:
    """Return what a machine with `limit` bytes could train; `bytes_each` are those of a parameter as it is now."""
    if on_cpu():
        return f"a model of up to about {_billions(limit, bytes_each)} parameters in this precision"
    this_one = ""
    for bits in (8, 4) if model.quantize.bits is None else ():
        size, _ = _size(replace(model, quantize=replace(model.quantize, bits=bits)))
        if 0 < size <= _SHARE_FOR_WEIGHTS * limit:
            this_one = f"this one with model.quantize.bits={bits} ({size / 1e9:.1f} GB), or "
            break
    return f"{this_one}a model of up to about {_billions(limit, _BYTES_IN_4_BITS)} parameters in 4 bits"


def _billions(limit: int, bytes_each: float) -> str:
    return f"{_SHARE_FOR_WEIGHTS * limit / bytes_each / 1e9:.1f} billion"
