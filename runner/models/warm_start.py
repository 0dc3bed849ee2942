"""Adapter weights from files of this program and others, and whether they fit a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from runner.checkpoints.safetensors_file import read_header
from runner.common import safe_json
from runner.common.errors import ModelError, RunnerError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS
from runner.common.text import shorten
from runner.models import npz
from runner.models.arrays import parse_arrays
from runner.models.lora import Params

_MAX_CONFIG_BYTES = 1 << 20
_MAX_CONFIG_VALUES = 10_000


def read_weights(path: Path, fitting: Params | None = None) -> dict[str, mx.array]:
    """Return adapter weights from an mlx-examples .npz, an mlx-lm .safetensors, or a folder with adapters.safetensors.

    Names and shapes are compared with those of `fitting`, if given, before any weights are read.

    Raises:
        ModelError: missing, of another kind, unreadable, or not fitting; a pickle inside an .npz is never loaded.
        CheckpointError: an invalid .safetensors file.
    """
    file = _weights_file(path)
    if file.suffix == ".npz":
        return _read_npz(file, path, fitting)
    spans, _ = read_header(file)
    if fitting is not None:
        _require_fit(fitting, {name: span.shape for name, span in spans.items()}, str(path))
    return parse_arrays(file.read_bytes(), source=str(file))


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        for file in (path / ADAPTERS, path / "adapters" / ADAPTERS, path / "adapters.npz"):
            if file.is_file():
                return file
        raise ModelError(f"adapter={path}: no {ADAPTERS} in this folder.")
    if not path.is_file():
        raise ModelError(f"adapter={path}: there is no such file or folder.")
    if path.suffix not in (".npz", ".safetensors"):
        raise ModelError(f"adapter={path}: expected .npz, .safetensors or an adapter folder, not '{path.suffix}'.")
    return path


def _read_npz(file: Path, path: Path, fitting: Params | None) -> dict[str, mx.array]:
    try:
        with npz.open_npz(file) as archive:
            if fitting is not None:
                _require_fit(fitting, dict.fromkeys(archive.names), str(path))
                _require_fit(fitting, archive.shapes(), str(path))
            return {name: mx.array(array) for name, array in archive.arrays()}
    except ModelError:
        raise
    except Exception as error:  # zip, zlib, numpy and value errors alike: not a plain .npz
        raise ModelError(f"adapter={path} cannot be read: {shorten(' '.join(str(error).split()))}") from error


def warm_start(params: Params, weights: dict[str, mx.array], where: str) -> Params:
    """Return `weights` in the dtypes of `params`, whose names and shapes they must have.

    Raises:
        ModelError: names arrays that are missing, unknown, of another shape or not finite, and what to set.
    """
    _require_fit(params, {name: array.shape for name, array in weights.items()}, where)
    for name in sorted(params):
        if not mx.all(mx.isfinite(weights[name])).item():
            raise _unfit(where, [f"{name} has NaN or Inf"])
    return {name: weights[name].astype(params[name].dtype) for name in params}


def _require_fit(params: Params, shapes: Mapping[str, tuple[int, ...] | None], where: str) -> None:
    """Raise ModelError unless names and shapes (None: not known yet) are those of `params`."""
    missing, unknown = sorted(set(params) - set(shapes)), sorted(set(shapes) - set(params))
    problems = [f"{len(missing)} arrays are missing, such as {missing[0]}"] if missing else []
    problems += [f"{len(unknown)} arrays are unknown, such as {shorten(unknown[0])}"] if unknown else []
    for name in sorted(set(params) & set(shapes)):
        if shapes[name] is not None and params[name].shape != shapes[name]:
            problems.append(f"{name} has shape {shorten(shapes[name])}, expected {params[name].shape}")
            break
    if problems:
        raise _unfit(where, problems)


def _unfit(where: str, problems: list[str]) -> ModelError:
    return ModelError(
        f"adapter={where} does not fit this run: {'; '.join(problems)}. "
        f"Set lora.type, lora.rank, lora.num_layers, lora.keys and lora.modules_to_save to what it was trained "
        f"with{_trained_with(where)}."
    )


def _trained_with(where: str) -> str:
    """Return the shape of the adapter in parentheses, if its adapter_config.json can be read."""
    path = Path(where)
    file = (path if path.is_dir() else path.parent) / ADAPTER_CONFIG
    try:
        config = safe_json.parse(FileSystem().read_file(file, _MAX_CONFIG_BYTES), max_values=_MAX_CONFIG_VALUES)
        kind, lora = config.get("fine_tune_type", "lora"), config["lora_parameters"]
        shape = "" if kind == "lora" else f"{kind}, "
        shape += f"rank {lora['rank']}, " if lora else ""
        shape += f"num_layers {config['num_layers']}"
        shape += f", keys {lora.get('keys')}" if lora else ""
    except (RunnerError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f" ({shorten(shape, 1000)})"
