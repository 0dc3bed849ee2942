"""train.epochs computes the number of updates; runs on a mix and on cut-off validation rows resume exactly."""

from __future__ import annotations

import json

import pytest
import yaml

from runner.common.errors import ConfigError
from runner.training.epochs import updates_of


@pytest.mark.parametrize(
    ("epochs", "rows", "batch_size", "accumulation", "updates"),
    [(1, 50, 4, 1, 13), (2, 50, 4, 3, 9), (0.1, 100, 1, 1, 10), (0.001, 50, 4, 1, 1), (3.0, 8, 4, 2, 3)],
)
def test_epochs_as_updates(epochs, rows, batch_size, accumulation, updates):
    assert updates_of(epochs, rows, batch_size, accumulation) == updates


def test_epochs_are_stored_as_updates_and_a_resume_keeps_them(tiny, train, tmp_path, assert_equal_runs):
    settings = {"train.epochs": 1.0, "train.iters": 1000, "schedule.name": "cosine", "lora.dropout": 0.1}
    whole = train(tiny(**settings), tmp_path / "whole")
    assert json.loads((whole / "status.json").read_text())["iters"] == 13
    assert yaml.safe_load((whole / "config.yaml").read_text())["train"]["iters"] == 13
    assert "train  1 epochs of 50 rows are 13 updates of 4 rows" in (whole / "run.log").read_text()
    stopped = train(tiny(**settings), tmp_path / "stopped", stop_at=5)
    train(tiny(**settings | {"train.iters": 13}), stopped, resume=stopped)
    assert_equal_runs(whole, stopped)
    with pytest.raises(ConfigError, match=r"train\.epochs was 1\.0 and cannot become 2\.0: the cosine schedule"):
        train(tiny(**settings | {"train.iters": 13, "train.epochs": 2.0}), whole, resume=whole)


def test_with_a_constant_rate_more_epochs_continue_the_run(tiny, train, tmp_path, assert_equal_runs):
    run = train(tiny(**{"train.epochs": 0.5}), tmp_path / "run")
    train(tiny(**{"train.epochs": 1.0, "train.iters": 7}), run, resume=run)
    assert json.loads((run / "status.json").read_text())["step"] == 13
    with pytest.raises(ConfigError, match="ends at update 2, before update 13"):
        train(tiny(**{"train.epochs": 0.1, "train.iters": 13}), run, resume=run)


def test_the_warmup_is_checked_once_the_updates_are_known(tiny, train, tmp_path):
    with pytest.raises(ConfigError, match=r"schedule\.warmup=13 leaves no update"):
        train(tiny(**{"train.epochs": 1.0, "schedule.warmup": 13}), tmp_path / "run")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


def test_typed_updates_replace_the_epochs_of_a_recipe(inline, tmp_path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/long.yaml").write_text("# @package _global_\ntrain:\n  epochs: 3\n")
    printed = inline("--config-dir", "mine", "experiment=long", "train.iters=5", "--cfg", "job")
    assert yaml.safe_load(printed)["train"]["epochs"] is None
    printed = inline("--config-dir", "mine", "experiment=long", "--cfg", "job")
    assert yaml.safe_load(printed)["train"]["epochs"] == 3
    assert "give one of them" in inline("train.iters=5", "train.epochs=1", expect=2)


def test_a_mix_is_resumed_exactly_and_other_weights_are_refused(tiny, train, tmp_path, assert_equal_runs):
    rows = [json.dumps({"prompt": f"say {n}", "completion": "word " * (n % 5 + 1)}) for n in range(11)]
    (tmp_path / "more.jsonl").write_text("\n".join(rows))
    mix = [{"path": "builtin:tiny", "weight": 1}, {"path": str(tmp_path / "more.jsonl"), "weight": 2}]
    settings = {"data.mix": mix, "data.valid_fraction": 0.2, "train.iters": 20}
    whole = train(tiny(**settings), tmp_path / "whole")
    stopped = train(tiny(**settings), tmp_path / "stopped", stop_at=7)
    moved = (tmp_path / "more.jsonl").rename(tmp_path / "moved.jsonl")
    mix = [mix[0], {"path": str(moved), "weight": 2}]
    train(tiny(**settings | {"data.mix": mix}), stopped, resume=stopped)
    weights = [run / "checkpoints/step-0000020/adapters.safetensors" for run in (whole, stopped)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    changed = [mix[0], {**mix[1], "weight": 1}]
    with pytest.raises(ConfigError, match=r"the sources or the weights of data\.mix changed"):
        train(tiny(**settings | {"data.mix": changed, "train.iters": 21}), stopped, resume=stopped)
