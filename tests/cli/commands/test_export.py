"""`runner export` writes what stock mlx-lm loads, with the same logits, whole or not at all, and replaces nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from runner.cli.commands import adapter_source, export, stored_settings
from runner.cli.commands.load_adapter import load_adapter
from runner.common.errors import CheckpointError, ConfigError, ModelError, StorageError
from runner.config import schema
from runner.export import mlx as export_mlx
from runner.models import load as models

IDS = mx.array([[1, 70, 71, 72, 3, 100, 259, 2]])
QUANTIZED = {"model.quantize.bits": 4, "model.quantize.group_size": 32}


def logits_of(run: Path, *overrides: str, checkpoint: str | None = None) -> mx.array:
    return load_adapter(
        adapter_source.find_adapter(run, checkpoint), stored_settings.read_settings(run, overrides), log=print
    ).base.model(IDS)


def stock(folder: Path, adapter: Path | None = None) -> mx.array:
    model, _ = mlx_lm.load(str(folder), adapter_path=str(adapter) if adapter else None)
    return model(IDS)


def difference(one: mx.array, other: mx.array) -> float:
    return mx.abs(one - other).max().item()


@pytest.fixture
def run(tiny: Callable, train_once: Callable, tmp_path: Path) -> Path:
    return train_once(tiny(**{"lora.num_layers": -1, "optimizer.learning_rate": 1e-2}), tmp_path / "run")


@pytest.fixture
def quantized_run(tiny: Callable, train: Callable, tmp_path: Path) -> Path:
    """A run on a quantized base that lies in a folder; on the CPU it is expanded to train."""
    model = schema.ModelConfig(path="builtin:tiny", quantize=schema.QuantizeConfig(bits=4, group_size=32))
    export_mlx.write_model_folder(models.load_base_model(model), tmp_path / "base")
    changes = {"model.path": str(tmp_path / "base"), "optimizer.learning_rate": 1e-2}
    return train(tiny(**changes), tmp_path / "run")


def test_an_adapter_folder_holds_the_same_bytes_and_the_number_of_layers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.run([str(run), "--to", "mlx"]) == 0
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (run / "export-mlx" / name).read_bytes() == (run / "adapters" / name).read_bytes()
    assert json.loads((run / "export-mlx" / "adapter_config.json").read_text())["num_layers"] == 4
    assert "--with-base writes it" in capsys.readouterr().out


def test_stock_mlx_lm_computes_the_same_with_the_exported_base(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.run([str(run), "--to", "mlx", "--with-base"]) == 0
    base, adapter = run / "export-mlx-base", run / "export-mlx"
    assert mx.array_equal(stock(base, adapter), logits_of(run))
    assert difference(stock(base), logits_of(run)) > 1e-2
    out = capsys.readouterr().out
    assert f"mlx_lm.generate --model {base} --adapter-path {adapter} --prompt" in out


def test_the_command_names_a_base_that_stock_mlx_lm_can_load(
    quantized_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.run([str(quantized_run), "--to", "mlx", "data.chat_template=false"]) == 0
    expected = f"--model {tmp_path / 'base'} --adapter-path {quantized_run / 'export-mlx'} --ignore-chat-template"
    assert expected in capsys.readouterr().out


def test_a_checkpoint_is_exported(run: Path) -> None:
    assert export.run([str(run), "--checkpoint", "4", "--to", "fused"]) == 0
    assert export.run([str(run / "checkpoints" / "step-0000004"), "--to", "mlx"]) == 0
    assert difference(stock(run / "export-fused-step-0000004"), logits_of(run, checkpoint="4")) < 1e-4
    assert (run / "export-mlx-step-0000004").is_dir()


def test_a_fused_model_has_the_logits_of_base_and_adapter(run: Path) -> None:
    assert export.run([str(run), "--to", "fused"]) == 0
    fused = stock(run / "export-fused")
    assert difference(fused, logits_of(run)) < 1e-4
    assert difference(fused, models.load_base_model(schema.ModelConfig(path="builtin:tiny")).model(IDS)) > 1e-2
    tokenizer = mlx_lm.load(str(run / "export-fused"))[1]
    assert tokenizer.has_chat_template and tokenizer.eos_token_ids == {2}


def test_an_export_has_the_template_of_the_run_and_names_its_variables(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% if enable_thinking %}!{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}")
    settings = [f"data.template={template}", "data.template_args.enable_thinking=false"]
    assert export.run([str(run), "--to", "fused", *settings]) == 0
    assert mlx_lm.load(str(run / "export-fused"))[1].chat_template == template.read_text()
    assert """--chat-template-config '{"enable_thinking": false}'""" in capsys.readouterr().out
    assert export.run([str(run), "--to", "mlx", *settings]) == 0
    assert f"chat template {template}, which an adapter folder does not contain" in capsys.readouterr().err


def test_a_quantized_base_stays_quantized_unless_dequantize_is_given(quantized_run: Path) -> None:
    run, ours = quantized_run, logits_of(quantized_run)
    assert export.run([str(run), "--to", "fused"]) == 0
    kept, _ = mlx_lm.load(str(run / "export-fused"))
    assert all(name in dict(tree_flatten(kept.parameters())) for name in ("model.layers.3.mlp.up_proj.scales",))
    rounded = difference(kept(IDS), ours)
    assert export.run([str(run), "--to", "fused", "--dequantize", "--out", str(run / "whole")]) == 0
    whole, _ = mlx_lm.load(str(run / "whole"))
    assert not any(name.endswith("scales") for name, _ in tree_flatten(whole.parameters()))
    assert "quantization" not in json.loads((run / "whole" / "config.json").read_text())
    assert difference(whole(IDS), ours) < 1e-4 < rounded
    base = difference(models.load_base_model(schema.ModelConfig(path=str(run.parent / "base"))).model(IDS), ours)
    assert rounded < base / 3  # the rounding takes little of what was learned


def test_a_base_quantized_while_loading_is_written_as_it_was_trained_on(
    tiny: Callable, train: Callable, tmp_path: Path
) -> None:
    run = train(tiny(**QUANTIZED), tmp_path / "run")
    assert export.run([str(run), "--to", "mlx", "--with-base"]) == 0
    assert difference(stock(run / "export-mlx-base", run / "export-mlx"), logits_of(run)) < 1e-4


@pytest.mark.parametrize("to", ["mlx", "fused"])
def test_an_existing_target_is_not_replaced(run: Path, tmp_path: Path, to: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for path in (target, run, run / "adapters"):
        before = sorted(path.rglob("*"))
        with pytest.raises(ConfigError, match="exists already"):
            export.run([str(run), "--to", to, "--out", str(path)])
        assert sorted(path.rglob("*")) == before
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        export.run([str(run), "--to", to, "--out", str(tmp_path / "link")])
    (tmp_path / "new-base").mkdir()
    with pytest.raises(ConfigError, match="new-base exists already"):
        export.run([str(run), "--to", "mlx", "--with-base", "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("[write] x"), KeyboardInterrupt()]
)
def test_a_failed_export_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(base: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(export_mlx, "write_model_folder", fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StorageError
    for options in (["--to", "fused"], ["--to", "mlx", "--with-base"]):
        with pytest.raises(expected):
            export.run([str(run), *options, "--out", str(tmp_path / "out" / "it")])
    assert os.listdir(tmp_path / "out") == []


def test_a_full_disk_is_detected_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.export.mlx.FileSystem.free_space", lambda self, folder: 1000)
    with pytest.raises(StorageError, match=r"needs .*, has"):
        export.run([str(run), "--to", "fused"])


def test_invalid_exports_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="--with-base needs --to mlx"):
        export.run([str(run), "--to", "fused", "--with-base"])
    with pytest.raises(ConfigError, match="--dequantize changes a base"):
        export.run([str(run), "--to", "mlx", "--dequantize"])
    with pytest.raises(ConfigError, match="--to"):
        export.run([str(run)])
    (run / "adapters" / "manifest.json").unlink()  # it would refuse the changes below before they are read
    path = run / "adapters" / "adapter_config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "num_layers": -1}))
    with pytest.raises(ModelError, match="num_layers is -1"):
        export.run([str(run), "--to", "mlx"])
    path.write_text(json.dumps(about))
    weights = run / "adapters" / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"adapters\.safetensors"):
        export.run([str(run), "--to", "mlx"])


def test_json_describes_the_export(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    capsys.readouterr()
    assert export.run([str(run), "--to", "fused", "--json", "--out", str(tmp_path / "a b")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["to"], document["folder"], document["base"], document["step"]) == (
        "fused",
        str(tmp_path / "a b"),
        None,
        12,
    )
    assert f"--model '{tmp_path / 'a b'}'" in document["command"]
    shutil.rmtree(tmp_path / "a b")
