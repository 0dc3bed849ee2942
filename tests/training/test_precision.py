"""What model.dtype and model.dequantize on auto meant is kept: a run that cannot be resumed so says why.

Runs that move between the CPU and a simulated GPU: tests/darwin/test_move.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_edits import edit_json

from runner.common.errors import ConfigError
from runner.config.schema import Config, ModelConfig
from runner.models import device, precision
from runner.models.precision import on_the_other_device, recorded_precision, resolve_auto

CPU, GPU = {"dtype": "float32", "dequantize": "always"}, {"dtype": "native", "dequantize": "never"}


@pytest.mark.parametrize(("on_cpu", "own", "other"), [(True, CPU, GPU), (False, GPU, CPU)])
def test_auto_is_what_was_recorded_else_the_choice_of_the_device(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, own: dict[str, str], other: dict[str, str]
) -> None:
    monkeypatch.setattr(precision, "on_cpu", lambda: on_cpu)
    auto, chosen = ModelConfig(path="m"), ModelConfig(path="m", dtype="bfloat16", dequantize="always")
    assert resolve_auto(auto) == ModelConfig(path="m", **own)
    assert resolve_auto(auto, other) == on_the_other_device(auto) == ModelConfig(path="m", **other)
    assert resolve_auto(auto, {"dtype": "float16"}).dequantize == own["dequantize"]
    assert resolve_auto(chosen, other) == on_the_other_device(chosen) == chosen


def test_of_an_older_checkpoint_the_device_tells() -> None:
    assert recorded_precision(None, "Device(gpu, 0)") == GPU
    assert recorded_precision(None, "Device(cpu, 0)") == CPU
    assert recorded_precision(None, None) == recorded_precision(None, 3) == {}
    assert recorded_precision({"dtype": "float32", "dequantize": ["x"]}) == {"dtype": "float32"}


def test_a_base_that_another_device_converted_in_another_way_is_refused_with_that_reason(
    tiny: Callable[..., Config], train: Callable[..., Path], tmp_path: Path
) -> None:
    # As float32 on every device: a base that is kept as it is stored is the same on all of them.
    settings = tiny(**{"train.iters": 4, "checkpoint.every": 2, "model.dtype": "float32"})
    run = train(settings, tmp_path / "run", stop_at=2)
    this, other = (f"Device({kind}, 0)" for kind in (("cpu", "gpu") if device.on_cpu() else ("gpu", "cpu")))

    def of_the_other(state: dict) -> None:
        state["environment"]["device"] = other
        state["fingerprints"]["model"] = "0" * 64

    edit_json(run / "checkpoints/step-0000002", "train_state.json", of_the_other)
    with pytest.raises(ConfigError, match=rf"other weights.*\n.*is of {re.escape(other)}, this is {re.escape(this)}"):
        train(settings, run, resume=run)
