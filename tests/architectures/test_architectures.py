"""Every architecture of mlx-lm that stock LoRA training can train is trained equally here, or refused with a reason."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters

from runner.backends.hidden_caches import hidden_caches
from runner.backends.mlx.loss import cross_entropy
from runner.backends.protocol import Backend
from runner.backends.select import select_backend
from runner.common.errors import ModelError, RunnerError
from runner.config import schema, validation
from runner.data.token_set import TokenSet
from runner.models.load import BaseModel
from runner.models.lora import AdaptedModel
from runner.training import optimizer
from runner.training.dataloader import batch_builder
from runner.training.train_state import TrainState
from runner.training.train_step import TrainStep
from tests.architectures.configs import LAYERS, NOT_LOADED_BY_STOCK, NOT_TRAINED_BY_STOCK, ROW_LENGTH, architectures
from tests.architectures.stock import ADAPTED_BLOCKS, LEARNING_RATE, LORA, build_model, build_rows, train

SAMPLE = (
    "llama",  # the plain one
    "gpt_oss",  # masks by a block's index, sinks, experts
    "cohere2",  # logits are scaled, blocks without positions
    "gemma3",  # a model inside a model, tied head, two kinds of windows
    "gemma4_text",  # keys and values shared between blocks: no cut
    "mamba",  # recurrent
    "rwkv7",  # the first block's values are read by all others: no cut
    "deepseek_v3",  # latent attention, router
)
"""What differs, for every run of the tests."""
UPDATES = 4
BY_ARCHITECTURE = [
    pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.long)
    for name in architectures()
    if name not in NOT_TRAINED_BY_STOCK
]


@dataclass
class Run:
    """An adapted model with what trains it."""

    adapted: AdaptedModel
    backend: Backend
    config: schema.Config
    rows: TokenSet

    def batch(self):
        """Return the batch of all rows, with cached hidden states where the backend has them."""
        caches = hidden_caches(self.backend, self.adapted.base, self.config, print)
        return batch_builder(self.rows, self.config, caches)(np.arange(len(self.rows)))


def build_config(**train_settings) -> schema.Config:
    config = schema.Config(optimizer=schema.OptimizerConfig(name="adam"))
    config.schedule.name = "constant"
    config.lora = schema.LoraConfig(
        rank=LORA["rank"], scale=LORA["scale"], num_layers=ADAPTED_BLOCKS, dropout=LORA["dropout"]
    )
    config.data.max_length = ROW_LENGTH
    config.train.cache_probes = False
    config.train.hidden_cache.disk_gb = 0.0
    for name, value in train_settings.items():
        setattr(config.train, name, value)
    return validation.fill_defaults(config)


def build_run(name: str, keys: list[str] | None = None, **train_settings) -> Run:
    config, tokens = build_config(**train_settings), np.array(build_rows())
    config.lora.keys = keys
    config.train.hidden_cache.enabled = train_settings.get("head") != "all"
    base = BaseModel(build_model(name), None, {"model_type": name}, name, fingerprint=name, content_hash=name)  # type: ignore[arg-type]
    base.model.freeze()
    adapted = AdaptedModel(base, config.lora, seed=2)
    rows = TokenSet(
        tokens.reshape(-1).astype(np.int32),
        np.tile(np.arange(ROW_LENGTH) > 0, len(tokens)),
        np.arange(len(tokens) + 1) * ROW_LENGTH,
        np.arange(len(tokens)),
    )
    return Run(adapted, select_backend(adapted, config, ROW_LENGTH), config, rows)


def build_state(run: Run) -> TrainState:
    params = run.adapted.params()
    return TrainState(params, optimizer.build_optimizer(run.config, params), seed=0)


def update(run: Run, state: TrainState, count: int) -> list[float]:
    step, batch = TrainStep(run.backend, grad_clip=None), run.batch()
    return [step.update(state, [batch], LEARNING_RATE).loss for _ in range(count)]


def own_loss(model: nn.Module, rows: mx.array) -> float:
    logits = model(rows[:, :-1]).astype(mx.float32)
    targets = rows[:, 1:].reshape(-1)
    return (cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, mx.ones(len(targets))) / len(targets)).item()


@pytest.mark.parametrize("name", BY_ARCHITECTURE)
def test_it_trains_as_stock_does(name: str, tmp_path: Path) -> None:
    rows = build_rows()
    run = build_run(name)
    batch, state = run.batch(), build_state(run)
    before = run.backend.row_losses(state.params, batch).total / batch.supervised
    assert before == pytest.approx(own_loss(run.adapted.model, rows), abs=1e-4)

    losses = update(run, state, UPDATES)
    stock_losses, stock_adapter = train(build_model(name), rows, UPDATES)
    assert losses == pytest.approx(stock_losses, abs=2e-4)
    assert {key: array.shape for key, array in state.params.items()} == {
        key: array.shape for key, array in stock_adapter.items()
    }

    # Restored after two updates into a model and an adapter built anew, it ends with the same bits.
    first = build_run(name)
    half = build_state(first)
    update(first, half, UPDATES // 2)
    second = build_run(name)
    resumed = build_state(second)
    resumed.params = dict(half.params)
    resumed.optimizer.restore(half.optimizer.state(), "memory")
    update(second, resumed, UPDATES - UPDATES // 2)
    for key, array in state.params.items():
        assert mx.array_equal(array, resumed.params[key]).item(), key

    # The adapter in stock mlx-lm gives the logits that it has here.
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), state.params)
    (tmp_path / "adapter_config.json").write_text(json.dumps(run.adapted.adapter_config()))
    if name in NOT_LOADED_BY_STOCK:
        mx.save_safetensors(str(tmp_path / "adapters.safetensors"), stock_adapter)
        with pytest.raises(ValueError, match="incompatible tensors"):
            load_adapters(build_model(name), str(tmp_path))
        return
    stock = load_adapters(build_model(name), str(tmp_path))
    stock.eval()
    run.adapted.place(state.params)
    run.adapted.model.eval()
    expected, found = np.array(stock(rows[:, :-1])), np.array(run.adapted.model(rows[:, :-1]))
    finite = np.isfinite(expected)  # phi3small gives some tokens no probability
    assert finite.any() and np.array_equal(found[~finite], expected[~finite])
    assert (
        np.abs(found - expected, where=finite, out=np.zeros_like(found)).max() <= 1e-4 * np.abs(expected[finite]).max()
    )


@pytest.mark.parametrize("name", BY_ARCHITECTURE)
def test_every_way_to_compute_gives_the_same_loss_and_gradients(name: str) -> None:
    plain = build_run(name, head="all")
    assert plain.backend.split_model.frozen_blocks == 0
    params = {
        key: array + 0.02 * mx.random.normal(array.shape, key=mx.random.key(index))
        for index, (key, array) in enumerate(plain.adapted.params().items())
    }
    expected_loss, expected = plain.backend.loss_and_grads(params, plain.batch(), mx.random.key(0))
    largest = max(mx.abs(grad).max().item() for grad in expected.values())
    for settings in ({}, {"grad_checkpoint": True}, {"loss_chunk": 7, "grad_checkpoint": True}):
        try:
            run = build_run(name, **settings)
        except RunnerError as refused:
            assert "train.grad_checkpoint" in str(refused) and "grad_checkpoint" in settings
            continue
        loss, grads = run.backend.loss_and_grads(params, run.batch(), mx.random.key(0))
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-4)
        for key, grad in expected.items():
            assert mx.abs(mx.array(grads[key]) - grad).max().item() <= 2e-3 * largest, (settings, key)


def test_the_sample_shows_models_with_and_without_a_cut() -> None:
    cut = {name: build_run(name).backend.split_model.frozen_blocks for name in ("llama", "gpt_oss", "rwkv7")}
    assert cut == {"llama": LAYERS - ADAPTED_BLOCKS, "gpt_oss": LAYERS - ADAPTED_BLOCKS, "rwkv7": 0}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "gemma3n",
            r"lora\.keys: the model reads the weights of altup\.correction_coefs, altup\.prediction_coefs itself",
        ),
        ("kimi_k3", r"lora\.keys: the model reads the weights of mlp_res_proj, self_attention_res_proj itself"),
        ("deepseek_v41", "mlx-lm cannot train this model"),
    ],
)
def test_what_stock_cannot_train_is_refused_with_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        build_run(name)


def test_without_the_layers_that_the_refusal_names_it_trains() -> None:
    with pytest.raises(ModelError) as refusal:
        build_run("kimi_k3")
    keys = str(refusal.value).partition("lora.keys=[")[2].partition("]")[0].split(",")
    run = build_run("kimi_k3", keys)
    assert set(keys) == set(run.adapted.targets.keys)
    assert update(run, build_state(run), 1)


@pytest.mark.long
def test_the_page_shows_what_is_possible() -> None:
    from tests.architectures.table import markdown

    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert markdown().strip() in page
