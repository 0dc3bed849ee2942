"""A run moves between the CPU and a (simulated) GPU of a Mac: on a quantized or 16-bit base it keeps its weights.

The simulated GPU computes with the CPU's kernels: see simulated_macos.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoint_edits import edit_json
from tiny_models import write_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS is simulated on Linux")
_IN_ONE_PROCESS = """
import json, sys
from runner.cli.main import main
for command in json.loads(sys.argv[1]):
    code = main(command)
    if code:
        sys.exit(code)
"""


class Devices:
    """Commands on the CPU of this machine and on the simulated GPU, in one folder."""

    def __init__(self, folder: Path, cpu: Any, gpu: Any) -> None:
        self.folder, self._cpu, self._gpu = folder, cpu, gpu

    def __call__(self, device: str, *commands: list[str], expect: int = 0, **environment: str) -> str:
        """Run the commands one after the other on `device`, and return their output."""
        if device == "cpu":
            return "".join(self._cpu(*command, expect=expect) for command in commands)
        process = self._gpu.start(json.dumps(commands), words=("-c", _IN_ONE_PROCESS), env=environment)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == expect, output
        return output

    def saved(self, step: int) -> dict[str, Any]:
        """The content of train_state.json of a checkpoint of `run`."""
        return json.loads((self.folder / f"run/checkpoints/step-{step:07d}/train_state.json").read_text())


@pytest.fixture
def devices(simulated_python: Path, make_cli: Callable, tmp_path: Path) -> Devices:
    gpu = make_cli(tmp_path)
    gpu.python = simulated_python
    gpu.environment["RUNNER_CACHE"] = str(simulated_python.parents[1] / "cache")
    return Devices(tmp_path, make_cli(tmp_path, in_process=True), gpu)


def start(base: Path) -> list[str]:
    """The command that trains two of four updates on the base."""
    small = ["data=tiny", "data.max_length=32", "lora.num_layers=2", "lora.rank=2", "train.batch_size=2"]
    some = ["train.iters=4", "checkpoint.every=2", "train.eval_every=2", "train.stop_at=2", "train.compile=never"]
    return [f"model.path={base}", "experiment=smoke", *small, *some, "train.eval_batches=2", "hydra.run.dir=run"]


FORMS = {"quantized": {"mode": "affine", "bits": 4, "group_size": 32}, "16 bits": {}}
KEPT = {"cpu": {"dtype": "float32", "dequantize": "always"}, "gpu": {"dtype": "native", "dequantize": "never"}}


@pytest.mark.parametrize(
    ("form", "first", "second"),
    [
        pytest.param("quantized", "cpu", "gpu", marks=pytest.mark.long),
        ("quantized", "gpu", "cpu"),
        pytest.param("16 bits", "cpu", "gpu", marks=pytest.mark.long),
        pytest.param("16 bits", "gpu", "cpu", marks=pytest.mark.long),
    ],
)
def test_a_run_resumes_on_another_device_with_its_weights(
    devices: Devices, tmp_path: Path, form: str, first: str, second: str
) -> None:
    base = write_model(tmp_path / "base", "llama", dtype=mx.bfloat16, **FORMS[form])
    out = devices(first, start(base), MLX_ENABLE_TF32="1")
    assert ("memory up to 1.48 GB of freed buffers" in out) == (first == "gpu")
    evaluated = ["test", "run", "--split", "valid", "--json"]
    there = devices(
        second,
        ["resume=run"],
        ["generate", "run", "hello", "--max-tokens", "2"],
        ["export", "run", "--to", "fused", "--out", "fused", "--force"],  # four bits swallow what four updates learned
        evaluated,
        MLX_ENABLE_TF32="0",
    )
    in_use = re.search(r"left  0\.\d\d GB, cache 0\.\d\d, peak 0\.\d\d$", there, re.MULTILINE)
    assert (in_use is not None) == (second == "gpu")
    assert "resumed from" in there and "device was" in there
    before, after = devices.saved(2), devices.saved(4)
    assert before["precision"] == after["precision"] == KEPT[first]
    assert before["fingerprints"]["model"] == after["fingerprints"]["model"]
    environment = before["environment"] if first == "gpu" else after["environment"]
    assert (environment["chip"], environment["macos"]) == ("applegpu_g14g", "15.5")
    assert environment["tf32"] == (first == "gpu")
    assert not {"chip", "macos", "tf32"} & (after if first == "gpu" else before)["environment"].keys()
    recorded = json.loads((tmp_path / "run/adapters/adapter_config.json").read_text())
    assert recorded["base_precision"] == KEPT[first]
    assert "quantization" in json.loads((tmp_path / "fused/config.json").read_text()) or form != "quantized"
    losses = [json.loads(text[text.index("{") :])["loss"] for text in (there, devices(first, evaluated))]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx([r["loss"] for r in rows if r["split"] == "valid"][-1], abs=1e-4)


def forget_precision(run: Path) -> None:
    """Make the run one of an earlier version, which recorded the device alone."""
    for folder in (*(run / "checkpoints").glob("step-*"), run / "adapters"):
        edit_json(folder, "adapter_config.json", lambda content: content.pop("base_precision"))
        if folder.name != "adapters":
            edit_json(folder, "train_state.json", lambda content: content.pop("precision"))


@pytest.mark.long
def test_a_run_of_an_earlier_version_keeps_what_its_device_chose(devices: Devices, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama", dtype=mx.bfloat16, **FORMS["quantized"])
    devices("gpu", start(base))
    forget_precision(tmp_path / "run")
    devices("cpu", ["generate", "run", "hello", "--max-tokens", "2"], ["resume=run"])
    assert devices.saved(4)["precision"] == KEPT["gpu"]
