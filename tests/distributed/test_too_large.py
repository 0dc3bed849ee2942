"""A model that does not fit into a rank's machine: what is refused, what is suggested, and why it is not split."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mlx.nn as nn
import pytest
from mlx.nn.layers.distributed import shard_linear
from mlx_lm.tuner.utils import linear_to_lora_layers

from runner.common.errors import ConfigError
from runner.config.schema import Config
from runner.training import too_large
from runner.training.too_large import refuse_too_large


@pytest.fixture
def config(tmp_path):
    layer = {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32, "num_key_value_heads": 32}
    model = {"model_type": "llama", **layer, "num_hidden_layers": 4, "vocab_size": 320, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps({**model, "torch_dtype": "bfloat16"}))
    config = Config()
    config.model.path, config.model.dtype = str(tmp_path), "bfloat16"
    return config


def refusal(config, *limits):
    """What rank 0 says where the machines of the ranks have so many bytes, None if nothing."""

    def gather(content):
        own = json.loads(content)
        return [json.dumps({**own, "limit": limit, "host": f"mac{rank}"}).encode() for rank, limit in enumerate(limits)]

    try:
        refuse_too_large(SimpleNamespace(size=len(limits), gather=gather), config)  # type: ignore[arg-type]
    except ConfigError as error:
        return str(error)
    return None


def test_the_smallest_machine_is_named_with_what_would_fit_there(config, monkeypatch):
    """Of 1.08 billion parameters: 2.16 GB in 16 bits, 1.14 in 8 and 0.61 in 4, with their scales."""
    monkeypatch.setattr(too_large, "on_cpu", lambda: False)
    assert refusal(config, 3e9, 3e9) is None
    text = refusal(config, 3e9, 1.6e9)
    assert "take 2.2 GB, and rank 1 (mac1) has 1.6 GB" in text
    assert "this one with model.quantize.bits=8 (1.1 GB), or a model of up to about 2.3 billion parameters" in text
    assert "this one with model.quantize.bits=4 (0.6 GB), or a model of up to about 1.4 billion" in refusal(
        config, 1e9, 2e9
    )
    assert "There would fit: a model of up to about 0.1 billion parameters in 4 bits" in refusal(config, 1e8, 2e9)
    monkeypatch.setattr(too_large, "on_cpu", lambda: True)
    assert "up to about 0.6 billion parameters in this precision" in refusal(config, 1.6e9, 3e9)


def test_mlx_lm_cannot_train_the_parts_of_a_split_model():
    """Why such a model is refused: should this fail with a later mlx-lm or MLX, splitting may have become possible."""
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    model, block = nn.Module(), nn.Module()
    block.q = shard_linear(nn.Linear(8, 8), "all-to-sharded", group=group)
    model.layers = [block]
    with pytest.raises(ValueError, match="Can't convert layer of type AllToShardedLinear"):
        linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": {"q"}})
