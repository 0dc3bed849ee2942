"""`runner plan` says before a run what it will take, and writes and downloads nothing."""

from __future__ import annotations

import json

import pytest

from runner.models import tiny

PARTS = ("weights", "adapter_and_optimizer", "activations", "logits", "caches", "process", "loading")


def test_the_plan_has_memory_by_its_parts_updates_time_and_disk(inline, tmp_path):
    arguments = ("plan", "model=tiny", "data=tiny", "train.iters=20", "checkpoint.every=5", "checkpoint.keep_last=2")
    plan = json.loads(inline(*arguments, "--json"))
    memory = plan["memory"]
    assert sum(memory[part] for part in PARTS) == memory["total"] and memory["fits"]
    assert (plan["updates"]["an_epoch"], plan["updates"]["rows_an_epoch"], plan["updates"]["of_the_run"]) == (
        13,
        50,
        20,
    )
    assert plan["time"]["measured_updates"] == 5 and plan["time"]["of_the_run"] > plan["time"]["an_update"] > 0
    assert plan["disk"]["checkpoints"] == 4  # the last two, the best and the newest
    printed = inline(*arguments, "--no-probe", "--fit")
    assert "total" in printed and "fits" in printed and "fit     as it is" in printed and "(--no-probe)" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("adapter", ["lora.rank=64", "lora.init=pissa", "lora.type=full"])
def test_a_checkpoint_has_the_size_that_the_plan_says(inline, tmp_path, adapter):
    arguments = ("model=tiny", "data=tiny", "train.iters=1", adapter)
    plan = json.loads(inline("plan", *arguments, "--no-probe", "--json"))
    inline(*arguments, "hydra.run.dir=run")
    size = sum(file.stat().st_size for file in (tmp_path / "run/checkpoints/step-0000001").iterdir())
    assert plan["disk"]["a_checkpoint"] == pytest.approx(size, rel=0.05)


def test_without_weights_the_config_of_the_model_suffices(inline, tmp_path, monkeypatch):
    monkeypatch.setattr("runner.models.load.load_base_model", lambda *_: pytest.fail("the model was loaded"))
    quantized = {"quantization": {"group_size": 64, "bits": 4}}
    (tmp_path / "m").mkdir()
    config = {**tiny.CONFIG, "hidden_size": 1024, "intermediate_size": 4096, "torch_dtype": "bfloat16", **quantized}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    arguments = ("plan", "model.path=m", "data=tiny", "model.dequantize=never", "model.dtype=bfloat16")
    plan = json.loads(inline(*arguments, "--json"))
    parameters = plan["model"]["parameters"]
    assert not plan["model"]["weights_are_here"] and plan["time"] is None and plan["updates"] is None
    # Half a byte for each weight, and a scale and an offset of two bytes for each 64 of them.
    assert plan["memory"]["weights"] == pytest.approx(parameters * (0.5 + 4 / 64), rel=0.01)
    tiny.build_tokenizer().save_pretrained(tmp_path / "m")
    assert json.loads(inline(*arguments, "--json"))["updates"]["rows_an_epoch"] == 50


def test_a_model_that_is_not_here_is_named_and_not_downloaded(inline, cache):
    assert "is not in the hub's cache" in inline("plan", "model.path=nobody/nothing", expect=2)
    assert "was not fetched yet" in inline("plan", expect=2)


def test_it_takes_the_settings_of_one_new_run(inline):
    assert "no -m and no resume=" in inline("plan", "resume=somewhere", expect=2)
