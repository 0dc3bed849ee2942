"""A base model with the same shapes but other weights than the adapter was trained on is refused."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from runner.config.schema import ModelConfig
from runner.export.mlx import write_model_folder
from runner.models.load import load_base_model

pytestmark = [pytest.mark.fault(19), pytest.mark.slow]

# In a block that the adapter does not change.
CHANGED_WEIGHT = "model.layers.2.self_attn.q_proj.weight"


def test_changed_base_weights_are_refused_by_their_fingerprint_and_the_original_ones_resume(
    cli, overrides, undisturbed, assert_ended_equal, contents
):
    model, run = cli.folder / "model", cli.folder / "run"
    write_model_folder(load_base_model(ModelConfig(path="builtin:tiny")), model)
    cli(*overrides, "model.path=model", "train.stop_at=6", "hydra.run.dir=run")
    file = model / "model.safetensors"
    original = file.read_bytes()
    weights, metadata = mx.load(str(file), return_metadata=True)
    weights[CHANGED_WEIGHT] = weights[CHANGED_WEIGHT] * 1.001
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata)
    (cli.folder / "elsewhere").mkdir()
    (cli.folder / "elsewhere/model").symlink_to("../model")
    state = json.loads((run / "checkpoints/step-0000006/train_state.json").read_text())
    for changes in ((), ("model.path=elsewhere/model",)):
        before = contents(run, but=(".lock", "run.log"))
        out = cli("resume=run", *changes, expect=2)
        assert "the base model has other weights" in out and "Traceback" not in out
        assert f"the fingerprint was {state['fingerprints']['model'][:16]} and is " in out
        assert "valid loss" not in out and "train loss" not in out
        after = contents(run, but=(".lock", "run.log"))
        assert {name for name in before | after if before.get(name) != after.get(name)} == set()
    file.write_bytes(original)
    cli("resume=run")
    assert_ended_equal(undisturbed(*overrides), run)  # the same weights from another path are the same base
