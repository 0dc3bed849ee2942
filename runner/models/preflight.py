"""A model folder, looked through before mlx-lm and transformers read it: they believe what its files claim.

MLX parses headers of up to 100 MB, Python's JSON builds many times the size of its text, and mlx-lm makes as many
layers as config.json says before it compares them with the weights.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from runner.checkpoints.safetensors_file import read_header
from runner.common.errors import CheckpointError, ModelError

_LARGEST = 100_000_000
"""Bytes of a file beside the weights. The largest tokenizer.json of a known model has about 35 MB."""
_MOST_VALUES = 5_000_000
"""Commas and brackets of a JSON file: a vocabulary of 260,000 tokens with its merges has half as many."""
_LARGEST_CONFIG = 4_000_000
_BESIDE = ("*.json", "*.jsonl", "*.jinja", "*.txt", "*.model", "*.tiktoken")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
"""Of a config: how often mlx-lm repeats a part that has tensors of its own."""
_FEW = 512
"""So many are made in no time, whatever the weights are."""
_PIECE = 1 << 20


def check_model_folder(folder: Path) -> None:
    """Refuse a folder whose files could fill the memory, or keep a parser busy, before anyone sees that they are wrong.

    Raises:
        ModelError: names the file and the reason.
    """
    tensors = 0
    try:
        for file in sorted(folder.glob("model*.safetensors")):
            tensors += len(read_header(file)[0])
        for file in sorted({file for pattern in _BESIDE for file in folder.glob(pattern)}):
            _look_at(file)
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    except OSError as error:
        raise ModelError(f"{error.filename or folder} cannot be read: {error.strerror}.") from None
    _compare_layers(folder / "config.json", tensors)


def _look_at(file: Path) -> None:
    there = file.stat()
    if stat.S_ISDIR(there.st_mode):
        return
    if not stat.S_ISREG(there.st_mode):
        raise ModelError(f"{file}: not a regular file.")
    if there.st_size > _LARGEST:
        raise ModelError(f"{file}: {there.st_size:,} bytes, more than the {_LARGEST:,} that such a file may have.")
    values = 0
    with file.open("rb") as source:
        while file.suffix.startswith(".json") and (piece := source.read(_PIECE)):
            values += sum(piece.count(mark) for mark in (b",", b"[", b"{"))
    if values > _MOST_VALUES:
        raise ModelError(f"{file}: it holds more than {_MOST_VALUES:,} values.")


def _compare_layers(file: Path, tensors: int) -> None:
    """No part is repeated more often than there are tensors."""
    if file.stat().st_size > _LARGEST_CONFIG:
        raise ModelError(f"{file}: larger than the {_LARGEST_CONFIG:,} bytes that it may have.")
    try:
        config = json.loads(file.read_bytes())  # some models' own say Infinity, which JSON does not know
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: it is not an object.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in _LAYERS:
            count: Any = part.get(name)
            if type(count) is int and count > max(tensors, _FEW):
                raise ModelError(f"{file}: {name} is {count:,}, but the weights are {tensors:,} tensors.")
