"""A base model of the very same shapes in the place of the one that the adapter was trained on: refused."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from runner.config import schema
from runner.export.mlx import write_model_folder
from runner.models.load import load_base_model

pytestmark = [pytest.mark.fault(19), pytest.mark.slow]


@pytest.fixture(scope="module")
def base():
    return load_base_model(schema.ModelConfig(path="builtin:tiny"))


def test_it_is_refused_by_its_fingerprint_and_the_right_one_goes_on(
    cli, base, overrides, undisturbed, ended_equal, contents
):
    model, run = cli.folder / "model", cli.folder / "run"
    write_model_folder(base, model)
    cli(*overrides, "model.path=model", "train.stop_at=6", "hydra.run.dir=run")
    file = model / "model.safetensors"
    own = file.read_bytes()
    weights, metadata = mx.load(str(file), return_metadata=True)
    one = weights["model.layers.2.self_attn.q_proj.weight"]  # in a block that the adapter does not touch
    weights["model.layers.2.self_attn.q_proj.weight"] = one * 1.001
    mx.eval(weights)
    mx.save_safetensors(str(file), weights, metadata)
    (cli.folder / "elsewhere").mkdir()
    (cli.folder / "elsewhere/model").symlink_to("../model")
    state = json.loads((run / "checkpoints/step-0000006/train_state.json").read_text())
    for tried in ((), ("model.path=elsewhere/model",)):
        before = contents(run, but=(".lock", "run.log"))
        out = cli("resume=run", *tried, expect=2)
        assert "the base model has other weights" in out and "Traceback" not in out
        assert f"fingerprint {state['fingerprints']['model'][:16]} then, " in out
        assert "valid loss" not in out and "train loss" not in out
        after = contents(run, but=(".lock", "run.log"))
        assert {name for name in before | after if before.get(name) != after.get(name)} == set()
    file.write_bytes(own)
    cli("resume=run")
    ended_equal(undisturbed(*overrides), run)  # the same weights from elsewhere are the same base
