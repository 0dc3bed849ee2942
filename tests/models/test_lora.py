"""Adapters on a base: their shape, where they start, warm starts from other tools, and a base given back as it was."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from runner.common.errors import ModelError, RunnerError
from runner.config import schema
from runner.config.schema import LoraConfig, ModelConfig
from runner.models.identity import weights_fingerprint
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel, trainable_share
from runner.models.warm_start import read_weights, warm_start


def base(**changes):
    model = ModelConfig(path="builtin:tiny")
    for name, value in changes.items():
        setattr(model.quantize if name in ("bits", "group_size") else model, name, value)
    return load_base_model(model)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_the_base_is_given_back_as_it_was_whatever_was_on_it(bits):
    made = base(bits=bits, group_size=32)
    before = weights_fingerprint(made.model, {})
    for rank, layers in ((2, 4), (8, -1), (1, 1)):
        adapted = AdaptedModel(made, LoraConfig(rank=rank, num_layers=layers, dropout=0.1), seed=1)
        assert adapted.num_layers == (4 if layers == -1 else layers)
        adapted.remove()
        assert weights_fingerprint(made.model, {}) == before == made.fingerprint


def test_the_start_follows_from_the_seed_alone_and_b_is_zero():
    made = base()
    params = []
    for seed in (1, 1, 2):
        mx.random.uniform(shape=(seed,))
        adapted = AdaptedModel(made, LoraConfig(rank=4), seed=seed)
        params.append(adapted.params())
        adapted.remove()
    a = [n for n in params[0] if n.endswith("lora_a")]
    assert all(mx.array_equal(params[0][n], params[1][n]).item() for n in params[0])
    assert not any(mx.array_equal(params[0][n], params[2][n]).item() for n in a)
    assert all(mx.all(params[0][n] == 0).item() for n in params[0] if n.endswith("lora_b"))


def test_keys_choose_layers_and_a_wrong_one_is_named():
    adapted = AdaptedModel(base(), LoraConfig(rank=2, num_layers=2, keys=["self_attn.q_proj"]), seed=0)
    assert set(adapted.params()) == {f"model.layers.{i}.self_attn.q_proj.lora_{x}" for i in (2, 3) for x in "ab"}
    assert trainable_share(adapted)[0] == 2 * (64 * 2 + 2 * 64)
    with pytest.raises(ModelError, match="Did you mean 'self_attn.q_proj'"):
        AdaptedModel(base(), LoraConfig(keys=["self_attn.q"]), seed=0)


def test_more_layers_than_the_model_has_means_all_and_the_config_says_the_real_number():
    adapted = AdaptedModel(base(), LoraConfig(rank=2, num_layers=99), seed=0)
    about = adapted.adapter_config()
    assert about["num_layers"] == 4
    assert about["lora_parameters"]["scale"] == schema.DEFAULT_LORA_SCALE
    json.dumps(about)


@pytest.fixture
def trained(tiny, train, tmp_path):
    return train(tiny(**{"train.iters": 3, "lora.rank": 4}), tmp_path / "old")


def test_warm_starts_from_a_folder_a_file_a_run_and_an_npz_begin_with_the_same_weights(tiny, train, tmp_path, trained):
    weights = read_weights(trained / "adapters")
    np.savez(tmp_path / "old.npz", **{name: np.array(array) for name, array in weights.items()})
    sources = [trained / "adapters", trained / "adapters/adapters.safetensors", trained, tmp_path / "old.npz"]
    results = []
    for i, source in enumerate(sources):
        run = train(tiny(**{"train.iters": 2, "lora.rank": 4, "adapter": str(source)}), tmp_path / f"warm{i}")
        results.append((run / "adapters/adapters.safetensors").read_bytes())
    assert len(set(results)) == 1
    cold = train(tiny(**{"train.iters": 2, "lora.rank": 4}), tmp_path / "cold")
    assert (cold / "adapters/adapters.safetensors").read_bytes() != results[0]


def test_a_warm_started_run_resumes_without_loading_its_start_again(tiny, train, tmp_path, trained, assert_equal_runs):
    import shutil

    settings = {"train.iters": 6, "lora.rank": 4, "adapter": str(trained / "adapters")}
    whole = train(tiny(**settings), tmp_path / "whole")
    run = train(tiny(**settings), tmp_path / "run", stop_at=3)
    shutil.rmtree(trained)
    train(tiny(**{"train.iters": 6, "lora.rank": 4}), run, resume=run)
    assert_equal_runs(whole, run)


def test_a_warm_start_that_does_not_fit_says_what_it_was_trained_with(trained):
    weights = read_weights(trained / "adapters")
    for lora, says in ((LoraConfig(rank=8), "has shape"), (LoraConfig(rank=4, num_layers=2), "are unknown")):
        with pytest.raises(ModelError, match=rf"(?s){says}.*rank 4, num_layers 4"):
            warm_start(AdaptedModel(base(), lora, seed=0).params(), weights, str(trained / "adapters"))
    fewer = {n: a for n, a in weights.items() if "layers.0" not in n}
    with pytest.raises(ModelError, match="arrays are missing"):
        warm_start(AdaptedModel(base(), LoraConfig(rank=4), seed=0).params(), fewer, "x")
    first = next(iter(weights))
    poisoned = {**weights, first: weights[first] * float("nan")}
    with pytest.raises(ModelError, match="has NaN or Inf"):
        warm_start(AdaptedModel(base(), LoraConfig(rank=4), seed=0).params(), poisoned, "x")


def test_files_that_are_no_adapters_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    np.savez(tmp_path / "trap.npz", x=np.array([Trap()], dtype=object))
    (tmp_path / "junk.safetensors").write_bytes(b"\x80\x04junk")
    (tmp_path / "a.bin").write_bytes(b"")
    for name in ("trap.npz", "junk.safetensors", "a.bin", "missing.npz", "."):
        with pytest.raises(RunnerError):
            read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()
