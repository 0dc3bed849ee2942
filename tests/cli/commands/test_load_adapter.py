"""An adapter is put on the base that it was trained on, exactly as it was, or the difference is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from runner.checkpoints.safetensors_file import pack
from runner.cli.commands import adapter_source, stored_settings
from runner.cli.commands.load_adapter import LoadedAdapter, load_adapter
from runner.common.errors import CheckpointError, ModelError
from runner.config import schema
from runner.export.mlx import write_model_folder
from runner.models import load as models
from runner.models.arrays import parse_arrays, to_tensors
from runner.models.lora import AdaptedModel

IDS = mx.array([[1, 70, 71, 72, 3, 100, 259, 2]])


def load(run: Path, *overrides: str, any_base: bool = False, lines: list[str] | None = None) -> LoadedAdapter:
    log = (lines if lines is not None else []).append
    return load_adapter(
        adapter_source.find_adapter(run), stored_settings.read_settings(run, overrides), any_base=any_base, log=log
    )


def by_hand(run: Path, name: str) -> Path:
    """A file of the result that a test writes anew, without the manifest that would refuse it before it is read."""
    (run / "adapters" / "manifest.json").unlink()
    return run / "adapters" / name


@pytest.fixture
def run(tiny: Callable, train_once: Callable, tmp_path: Path) -> Path:
    return train_once(tiny(**{"lora.dropout": 0.1}), tmp_path / "run")


@pytest.fixture
def other_base(tmp_path: Path) -> Path:
    """A folder with a base of the same shapes and other weights."""
    base = models.load_base_model(schema.ModelConfig(path="builtin:tiny"))
    base.model.load_weights([("model.norm.weight", base.model.model.norm.weight * 1.5)], strict=False)
    write_model_folder(base, tmp_path / "other")
    return tmp_path / "other"


def test_the_loaded_model_has_the_trained_weights(run: Path) -> None:
    loaded = load(run)
    saved = parse_arrays((run / "adapters" / "adapters.safetensors").read_bytes(), source="")
    assert loaded.adapted is not None
    params = loaded.adapted.params()
    assert set(params) == set(saved)
    assert all(mx.array_equal(params[name], saved[name]) for name in saved)
    assert not loaded.base.model.training


def test_detaching_restores_the_base_and_attaching_the_model(run: Path) -> None:
    bare = models.load_base_model(schema.ModelConfig(path="builtin:tiny")).model(IDS)
    loaded = load(run)
    first = loaded.base.model(IDS)
    assert mx.abs(first - bare).max().item() > 1e-3
    loaded.detach()
    assert mx.array_equal(loaded.base.model(IDS), bare)
    loaded.attach()
    assert mx.array_equal(loaded.base.model(IDS), first)


def test_a_copy_of_the_base_is_accepted(run: Path, tmp_path: Path) -> None:
    write_model_folder(models.load_base_model(schema.ModelConfig(path="builtin:tiny")), tmp_path / "copy")
    lines: list[str] = []
    copy = load(run, f"model.path={tmp_path / 'copy'}", lines=lines)
    assert mx.array_equal(copy.base.model(IDS), load(run).base.model(IDS))
    assert not lines


def test_a_different_base_is_refused_without_any_base(run: Path, other_base: Path) -> None:
    with pytest.raises(ModelError, match=r"other weights than the base .*fingerprint .*--any-base"):
        load(run, f"model.path={other_base}")
    lines: list[str] = []
    loaded = load(run, f"model.path={other_base}", any_base=True, lines=lines)
    assert not mx.array_equal(loaded.base.model(IDS), load(run).base.model(IDS))
    assert any("other weights" in line for line in lines)


@pytest.mark.parametrize(
    "overrides", [["model.dtype=bfloat16"], ["model.quantize.bits=8", "model.quantize.group_size=32"]]
)
def test_another_dtype_of_the_base_is_accepted_and_a_different_base_refused(
    run: Path, other_base: Path, overrides: list[str]
) -> None:
    loaded = load(run, *overrides)
    difference = mx.abs(loaded.base.model(IDS).astype(mx.float32) - load(run).base.model(IDS)).max().item()
    assert 0 < difference < 0.2
    with pytest.raises(ModelError, match="other weights"):
        load(run, *overrides, f"model.path={other_base}")


def test_an_adapter_without_a_base_fingerprint_is_refused(run: Path) -> None:
    path = by_hand(run, "adapter_config.json")
    about = json.loads(path.read_text())
    del about["base_fingerprint"]
    path.write_text(json.dumps(about))
    with pytest.raises(ModelError, match="names no base_fingerprint"):
        load(run)
    load(run, any_base=True)


@pytest.mark.parametrize("key", ["num_layers", "lora_parameters", "fine_tune_type"])
def test_an_adapter_config_that_contradicts_the_settings_is_refused(run: Path, key: str) -> None:
    path = by_hand(run, "adapter_config.json")
    about = json.loads(path.read_text())
    about[key] = {**about[key], "scale": 3.0} if key == "lora_parameters" else 1
    path.write_text(json.dumps(about))
    with pytest.raises(ModelError, match=rf"adapter_config\.json says {key}"):
        load(run)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("missing", ModelError, "1 arrays are missing"),
        ("unknown", ModelError, "1 arrays are unknown, such as model.more"),
        ("shape", ModelError, r"has shape \(64, 4\), but must have \(64, 8\)"),
        ("nan", CheckpointError, "contains NaN or Inf"),
        ("cut", CheckpointError, "adapters.safetensors"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_detached(
    run: Path, monkeypatch: pytest.MonkeyPatch, change: str, error: type[Exception], message: str
) -> None:
    path = by_hand(run, "adapters.safetensors")
    arrays = parse_arrays(path.read_bytes(), source="")
    name = next(n for n in sorted(arrays) if n.endswith("q_proj.lora_a"))
    if change == "missing":
        del arrays[name]
    elif change == "unknown":
        arrays["model.more"] = mx.zeros((2,))
    elif change == "shape":
        arrays[name] = arrays[name][:, :4]
    elif change == "nan":
        arrays[name] = arrays[name] * float("nan")
    data = pack(to_tensors(arrays), {"format": "mlx"})
    path.write_bytes(data[:-8] if change == "cut" else data)
    removed: list[AdaptedModel] = []
    own = AdaptedModel.remove
    monkeypatch.setattr(AdaptedModel, "remove", lambda self: (removed.append(self), own(self))[1])
    with pytest.raises(error, match=message):
        load(run)
    assert len(removed) == (error is ModelError)
