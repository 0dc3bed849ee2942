"""The comparison that decides whether the CPU engine may train a model."""

from __future__ import annotations

import numpy as np
import pytest

from runner.backends.cpu import native, probe
from runner.backends.cpu.engine import Engine
from runner.config.schema import LoraConfig, ModelConfig
from runner.models import split_probe
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel
from runner.models.split_model import SplitModel

pytestmark = pytest.mark.cpu("the CPU engine")


def verdict(path: str, change=lambda loss, grads: (loss, grads), **lora) -> bool:
    """Return whether the probe accepts the engine on a model when `change` was made to what it computes."""
    adapted = AdaptedModel(load_base_model(ModelConfig(path=path)), LoraConfig(**lora), seed=0)
    engine = Engine(adapted.model, chunk=256, ops=native.load()[0])
    own = engine.loss_and_grads
    engine.loss_and_grads = lambda *arguments: change(*own(*arguments))
    return probe.agrees(engine, adapted, SplitModel(adapted.model, split_probe.unverified_parts(adapted.model, 0)))


def scaled(grads: dict[str, np.ndarray], factor: float, ending: str = "") -> dict[str, np.ndarray]:
    return {name: grad * np.float32(factor if name.endswith(ending) else 1) for name, grad in grads.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda loss, grads: (loss * 1.0002, grads),
        lambda loss, grads: (loss, scaled(grads, 1.002)),
        lambda loss, grads: (loss, scaled(grads, 1.01, "layers.3.self_attn.k_proj.lora_a")),
        lambda loss, grads: (loss, dict(list(grads.items())[1:])),
        lambda loss, grads: (loss, {name: grad.T for name, grad in grads.items()}),
    ],
    ids=["loss", "all gradients", "one gradient", "a missing one", "shapes"],
)
def test_an_engine_that_computes_something_else_is_refused(change):
    assert verdict("builtin:tiny") and not verdict("builtin:tiny", change)


@pytest.mark.slow
def test_noise_of_small_ranks_is_accepted():
    assert verdict("builtin:smollm2_135m", rank=1, num_layers=-1)
