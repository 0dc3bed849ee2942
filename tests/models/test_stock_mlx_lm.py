"""Stock mlx-lm loads every adapter folder that a run writes, in this process and by its own commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from runner.cli.commands import adapter_source, export, generate, stored_settings
from runner.cli.commands.load_adapter import load_adapter
from runner.config import schema
from runner.config.schema import Config
from runner.export.mlx import write_model_folder
from runner.models.load import load_base_model

pytestmark = pytest.mark.slow

# mlx-lm's commands take half a minute with the small model, seconds with the tiny one.
USES_MLX_LM_COMMANDS = pytest.mark.parametrize(
    "base", ["tiny", pytest.param("smollm2", marks=pytest.mark.long)], indirect=True, scope="module"
)
IDS = mx.array([[1, 70, 71, 72, 3, 100, 259, 2, 300, 17]])
TOLERANCE = 1e-4
"""For logits of magnitude up to 30: float32 products, summed in another order once weights are merged. For larger ones
it grows with them, as float32's rounding does."""


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=pytest.mark.long)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The base model's name in a run's config, and the model as a folder, in the dtype that training computes in."""
    name = "builtin:tiny" if request.param == "tiny" else str(request.getfixturevalue("smollm2"))
    folder = tmp_path_factory.mktemp("base") / request.param
    write_model_folder(load_base_model(schema.ModelConfig(path=name)), folder)
    return name, folder


@pytest.fixture
def run(base: tuple[str, Path], tiny: Callable[..., Config], train: Callable[..., Path]) -> Path:
    """One run on each base, shared by the tests, which only read it."""
    folder = base[1].with_name("run")
    changes = {"model.path": base[0], "optimizer.learning_rate": 1e-2, "lora.num_layers": 3, "train.eval_batches": 1}
    return folder if folder.exists() else train(tiny(**changes), folder)


def adapter_folders(run: Path) -> list[Path]:
    return [run / "adapters", *sorted((run / "checkpoints").glob("step-*"))]


def logits_of(path: Path, run: Path) -> mx.array:
    return load_adapter(adapter_source.find_adapter(path), stored_settings.read_settings(run), log=print).base.model(
        IDS
    )


def mlx_lm_command(*arguments: str) -> str:
    """Return the output of `python -m mlx_lm …`; on the CPU it uses its wheel's own BLAS, which is correct but slow."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mlx_lm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def test_the_result_and_every_checkpoint_give_the_same_logits_in_mlx_lm(run: Path, base: tuple[str, Path]) -> None:
    folders = adapter_folders(run)
    assert len(folders) == 4
    bare = mlx_lm.load(str(base[1]))[0](IDS)
    for folder in folders:
        model, _ = mlx_lm.load(str(base[1]), adapter_path=str(folder))
        logits = model(IDS)
        assert mx.abs(logits - logits_of(folder, run)).max().item() < TOLERANCE, folder
        assert mx.abs(logits - bare).max().item() > 100 * TOLERANCE, folder


@USES_MLX_LM_COMMANDS
def test_mlx_lm_generate_gives_the_same_answer(
    run: Path, base: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    step = run / "checkpoints" / "step-0000012"
    capsys.readouterr()
    assert generate.run([str(step), "hello there", "--max-tokens", "6", "--json", "--compare-base"]) == 0
    bare, answer = (a["text"] for a in json.loads(capsys.readouterr().out)["answers"])
    assert answer and answer != bare
    arguments = ["--model", str(base[1]), "--adapter-path", str(step), "--prompt", "hello there", "--max-tokens", "6"]
    output = mlx_lm_command("generate", *arguments, "--temp", "0", "--verbose", "False")
    assert output == f"{answer}\n"


@USES_MLX_LM_COMMANDS
def test_an_exported_fused_model_equals_that_of_mlx_lm_fuse(run: Path, base: tuple[str, Path], tmp_path: Path) -> None:
    mlx_lm_command(
        "fuse", "--model", str(base[1]), "--adapter-path", str(run / "adapters"), "--save-path", str(tmp_path / "s")
    )
    theirs = mlx_lm.load(str(tmp_path / "s"))[0](IDS)
    assert export.run([str(run), "--to", "fused", "--dequantize", "--out", str(tmp_path / "f")]) == 0
    fused = mlx_lm.load(str(tmp_path / "f"))[0](IDS)
    expected = logits_of(run, run)
    tolerance = TOLERANCE * max(1.0, mx.abs(expected).max().item() / 30)
    assert mx.abs(theirs - expected).max().item() < tolerance
    assert mx.abs(fused - expected).max().item() < tolerance


@pytest.mark.long
@pytest.mark.parametrize("base", ["smollm2"], indirect=True)  # the tiny one's weights are float32
def test_a_quantized_base_is_exported_quantized_with_close_logits(
    run: Path, base: tuple[str, Path], tmp_path: Path
) -> None:
    assert export.run([str(run), "--to", "mlx", "--with-base", "--out", str(tmp_path / "a")]) == 0
    assert export.run([str(run), "--to", "fused", "--out", str(tmp_path / "f")]) == 0
    expected, few_ids = logits_of(run, run)[:, :3], IDS[:, :3]  # quantized products are slow on the CPU
    model, _ = mlx_lm.load(str(tmp_path / "a-base"), adapter_path=str(tmp_path / "a"))
    bare = mlx_lm.load(str(tmp_path / "a-base"))[0](few_ids)
    fused = mlx_lm.load(str(tmp_path / "f"))[0](few_ids)
    assert mx.abs(model(few_ids) - expected).max().item() < 10 * TOLERANCE
    learned = mx.abs(bare - expected).mean().item()
    assert mx.abs(fused - expected).mean().item() < learned / 4
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("a-base", "f")]
    assert max(sizes) < base[1].joinpath("model.safetensors").stat().st_size / 4
