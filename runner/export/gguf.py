"""`--to gguf`: the base model with the adapter merged as one file, which llama.cpp loads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from runner.common.errors import ModelError
from runner.common.storage_errors import storage_errors
from runner.export.fidelity import ROUNDED_LIMIT, FidelityRows, Measured, limit_of
from runner.export.gguf_metadata import find_architecture, model_metadata
from runner.export.gguf_tokenizer import assign_stops, find_stops, read_tokenizer, tokenizer_metadata
from runner.export.mlx import require_space
from runner.export.target import Target, load_written
from runner.export.trained_adapter import TrainedAdapter
from runner.models import fetch
from runner.models.gguf.families import Family
from runner.models.gguf.header import Value
from runner.models.load import BaseModel

FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""`general.file_type` by the type of most weights."""
_FALLBACK = {"q8_0": "f16"}
"""The type of a matrix whose width is no multiple of the block."""
_TOP_LEVEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LARGEST_FLOAT16 = 65504.0


class GgufTarget(Target):
    """`--to gguf`; `type_name`: one of FILE_TYPES, None for 16 bits that the model bears."""

    limit = ROUNDED_LIMIT

    def __init__(self, type_name: str | None) -> None:
        self._type = type_name
        self._tokenizer: Any = None

    def write(self, trained: TrainedAdapter, path: Path) -> None:
        """Write the file. Raises ModelError for a model that such a file cannot hold."""
        _gguf()
        assert trained.adapted is not None
        architecture, family = find_architecture(trained.adapted.base)  # before anything is merged
        fused = trained.fuse(dequantize=True)
        type_name = self._type or ("bf16" if family.overflows_float16 or _is_bfloat16(fused) else "f16")
        self._tokenizer = vars(fused.tokenizer).get("_tokenizer", fused.tokenizer)
        dtypes = {str(array.dtype).rpartition(".")[2] for _, array in tree_flatten(fused.model.parameters())}
        self.limit = limit_of([type_name, *dtypes])
        source = _source_file(trained)
        write_file(fused, path, architecture, family, type_name, source)
        stops = {} if source else find_stops(self._tokenizer, set(fused.tokenizer.eos_token_ids))
        for token in assign_stops(stops)[1]:
            trained.log(
                f"the model also stops at {token}, for which a GGUF file has no place left: "
                f"llama-cli --reverse-prompt {shlex.quote(token)}"
            )

    def measure(self, trained: TrainedAdapter, path: Path, rows: FidelityRows) -> Measured:
        """Load the file as `model.path` does, and compare its tokens as well."""
        written = read_tokenizer(path)
        for text in rows.texts(20):
            if written.encode(text, add_special_tokens=False) != self._tokenizer.encode(text, add_special_tokens=False):
                raise ModelError(
                    f"The tokenizer in the file gives other tokens than the model's own, for {text[:60]!r}: llama.cpp "
                    "has no scheme that splits text as it does."
                )
        return rows.measure_model(load_written(path, trained.config))


def write_file(
    base: BaseModel, path: Path, architecture: str, family: Family, type_name: str, source: Path | None
) -> None:
    """Write `base`, which carries no adapter and is not quantized, one tensor at a time.

    Args:
        source: the GGUF file that it was read from, whose tokenizer is copied; None for another origin.

    Raises:
        ModelError: a parameter or a setting has no place in the file.
        StorageError: the disk is full or fails.
    """
    gguf = _gguf()
    metadata, factors = model_metadata(base, architecture)
    parameters = dict(tree_flatten(base.model.parameters()))
    tokenizer = vars(base.tokenizer).get("_tokenizer", base.tokenizer)
    rows = parameters["model.embed_tokens.weight"].shape[0]
    metadata[f"{architecture}.vocab_size"] = rows
    metadata |= tokenizer_metadata(tokenizer, rows, source, set(base.tokenizer.eos_token_ids))
    names = {parameter: tensor_name(parameter, family) for parameter in parameters}
    types = {parameter: _type_of(names[parameter], array, type_name) for parameter, array in parameters.items()}
    require_space(
        sum(
            array.size * 4 if t == "f32" else array.size * 2
            for t, array in zip(types.values(), parameters.values(), strict=True)
        ),
        path.parent,
    )
    writer = gguf.GGUFWriter(path, architecture)
    with storage_errors(path, "written"):
        _add_metadata(writer, gguf, {"general.file_type": FILE_TYPES[type_name], "general.quantization_version": 2})
        _add_metadata(writer, gguf, metadata)
        for parameter, array in parameters.items():
            shape = _file_shape(names[parameter], array.shape)
            kind = gguf.GGMLQuantizationType[types[parameter].upper()]
            byte_shape = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(names[parameter], byte_shape, np.dtype(np.uint8), int(np.prod(byte_shape)), kind)
        for name, values in factors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in _tensor_data(gguf, base, parameters, names, types, family):
            writer.write_tensor_data(data)
        for values in factors.values():
            writer.write_tensor_data(values)
        writer.close()


def tensor_name(parameter: str, family: Family) -> str:
    """Return llama.cpp's name of a parameter of mlx-lm. Raises ModelError where it has none."""
    module, _, part = parameter.rpartition(".")
    if module in _TOP_LEVEL and part == "weight":
        return f"{_TOP_LEVEL[module]}.weight"
    match = _BLOCK.fullmatch(parameter)
    stem = match and {own: stem for stem, own in family.modules.items()}.get(match[2])
    if match is None or stem is None:
        raise ModelError(
            f"The model has {parameter}, which has no place in a GGUF file of a {family.model_type} model."
        )
    return f"blk.{match[1]}.{stem}.{match[3]}"


def _tensor_data(
    gguf: Any,
    base: BaseModel,
    parameters: dict[str, mx.array],
    names: dict[str, str],
    types: dict[str, str],
    family: Family,
) -> Iterator[np.ndarray]:
    for parameter, array in parameters.items():
        values = np.array(array.astype(mx.float32))
        if family.norm_offset and names[parameter].endswith("norm.weight"):
            values = values + np.float32(family.norm_offset)
        if family.interleaves_rows and ".attn_q." in names[parameter]:
            values = _interleave(values, base.config["num_attention_heads"])
        if family.interleaves_rows and ".attn_k." in names[parameter]:
            values = _interleave(values, base.config.get("num_key_value_heads") or base.config["num_attention_heads"])
        if types[parameter] == "f16" and np.abs(values).max() > _LARGEST_FLOAT16:
            raise ModelError(f"{parameter} exceeds the range of float16: --type bf16 or f32.")
        values = np.ascontiguousarray(values.reshape(_file_shape(names[parameter], array.shape)))
        yield gguf.quants.quantize(values, gguf.GGMLQuantizationType[types[parameter].upper()]).view(np.uint8)


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows in llama.cpp's order: in each head, (2, head_dim / 2) becomes (head_dim / 2, 2)."""
    half = values.shape[0] // heads // 2
    return values.reshape(heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if ".ffn_gate_inp_shexp." in name else shape


def _type_of(name: str, array: mx.array, type_name: str) -> str:
    """Return the type of a tensor: vectors and the gates of experts stay in 32 bits, as the converter has them."""
    if array.ndim == 1 or ".ffn_gate_inp" in name:
        return "f32"
    return _FALLBACK[type_name] if type_name in _FALLBACK and array.shape[-1] % 32 else type_name


def _add_metadata(writer: Any, gguf: Any, metadata: dict[str, Value]) -> None:
    kinds = gguf.GGUFValueType
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_key_value(key, value, kinds.BOOL)
        elif isinstance(value, int):
            writer.add_key_value(key, value, kinds.UINT32)
        elif isinstance(value, float):
            writer.add_key_value(key, value, kinds.FLOAT32)
        elif isinstance(value, str):
            writer.add_key_value(key, value, kinds.STRING)
        elif isinstance(value, np.ndarray):
            kind = kinds.FLOAT32 if value.dtype.kind == "f" else kinds.INT32
            writer.add_key_value(key, value.tolist(), kinds.ARRAY, sub_type=kind)
        elif len(value):
            writer.add_key_value(key, value, kinds.ARRAY, sub_type=kinds.STRING)


def _is_bfloat16(base: BaseModel) -> bool:
    return "bfloat16" in str(base.config.get("torch_dtype") or base.config.get("dtype"))


def _source_file(trained: TrainedAdapter) -> Path | None:
    path = trained.config.model.path
    if path.startswith("builtin:") and path.removeprefix("builtin:") in fetch.BUILTIN_MODELS:
        return fetch.fetch_model(path.removeprefix("builtin:"))
    return Path(path) if path.endswith(".gguf") else None


def _gguf() -> Any:
    try:
        return import_module("gguf")
    except ImportError:
        raise ModelError("--to gguf needs the package gguf: pip install 'mlx-runner[gguf]'") from None
