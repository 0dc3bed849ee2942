"""Check the files of a model folder before mlx-lm and transformers read it, because both trust what the files claim.

MLX parses headers of up to 100 MB, Python's JSON parser builds objects many times the size of the text, and mlx-lm
creates as many layers as config.json claims before it compares them with the weights.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from runner.checkpoints.safetensors_file import read_header
from runner.common.errors import CheckpointError, ModelError
from runner.common.filesystem import is_apple_double

_MAX_BYTES = 100_000_000
"""Of a file other than the weights. The largest tokenizer.json of a known model has about 35 MB."""
_MAX_CONFIG_BYTES = 4_000_000
_MAX_JSON_VALUES = 5_000_000
"""Commas and brackets. A vocabulary of 260,000 tokens with its merges has half as many."""
_CHECKED_FILES = ("*.json", "*.jsonl", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_LAYER_COUNT_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
_ALWAYS_ACCEPTED_LAYERS = 512
"""So many layers are created in no time, whatever the weights are."""
_CHUNK_BYTES = 1 << 20


def check_model_folder(folder: Path) -> None:
    """Refuse a folder whose files could exhaust the memory or occupy a parser for long.

    Raises:
        ModelError: names the file and the reason.
    """
    tensor_count = 0
    try:
        for file in sorted(folder.glob("model*.safetensors")):
            tensor_count += len(read_header(file)[0])
        for file in sorted({file for pattern in _CHECKED_FILES for file in folder.glob(pattern)}):
            if not is_apple_double(file.name):
                _check_size(file)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    except OSError as error:
        raise ModelError(f"{error.filename or folder} cannot be read: {error.strerror}.") from None
    _check_layer_count(folder / "config.json", tensor_count)


def _check_size(file: Path) -> None:
    status = file.stat()
    if stat.S_ISDIR(status.st_mode):
        return
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{file}: not a regular file.")
    if status.st_size > _MAX_BYTES:
        raise ModelError(f"{file}: {status.st_size:,} bytes, more than the {_MAX_BYTES:,} that are accepted.")
    if not file.suffix.startswith(".json"):
        return
    value_count = 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            value_count += sum(chunk.count(mark) for mark in (b",", b"[", b"{"))
    if value_count > _MAX_JSON_VALUES:
        raise ModelError(f"{file}: more than {_MAX_JSON_VALUES:,} values.")


def _check_layer_count(file: Path, tensor_count: int) -> None:
    """Refuse a config that claims more layers than the weights have tensors."""
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise ModelError(f"{file}: larger than the {_MAX_CONFIG_BYTES:,} bytes that are accepted.")
    try:
        config = json.loads(file.read_bytes())  # not safe_json: some models' configs contain Infinity
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: invalid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: not a JSON object.")
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _LAYER_COUNT_KEYS:
            count: Any = section.get(key)
            if type(count) is int and count > max(tensor_count, _ALWAYS_ACCEPTED_LAYERS):
                raise ModelError(f"{file}: {key} is {count:,}, but the weights have only {tensor_count:,} tensors.")
