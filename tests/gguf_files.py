"""GGUF files for tests: a small writer, independent of the reader, and a llama model of random weights.

Loaded by path from the conftest files of tests/models and tests/export and from tests/faults.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TYPE_NUMBERS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30,
}  # fmt: skip
"""ggml's numbers of the tensor types."""

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS = 4, 2, 16, 64, 96, 2
"""The shape of `tiny_llama`."""

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "token_embd")
MIXED_TYPES = dict(zip(MATRICES, ("Q4_0", "Q8_0", "F16", "Q4_1", "F32", "BF16", "Q4_1", "Q8_0"), strict=True))
"""A type for each matrix, so that one file contains every supported type."""

CHAT_TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>{% endfor %}"


def encode_string(text: str | bytes) -> bytes:
    """Return `text` as a GGUF string."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def encode_value(value: Any) -> bytes:
    """Return the type number and the bytes of one metadata value; bytes are returned unchanged."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + encode_string(value)
    if all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(encode_string, value))
    if any(isinstance(item, float) for item in value):
        return struct.pack("<IIQ", 9, 6, len(value)) + np.asarray(value, "<f4").tobytes()
    return struct.pack("<IIQ", 9, 5, len(value)) + np.asarray(value, "<i4").tobytes()


def encode_tensor(values: np.ndarray, type_name: str) -> tuple[bytes, np.ndarray]:
    """Return `values` (rows, columns) encoded as `type_name`, and the float32 values that the bytes stand for."""
    if type_name == "F32":
        return values.astype("<f4").tobytes(), values.astype(np.float32)
    if type_name == "F16":
        return values.astype("<f2").tobytes(), values.astype(np.float16).astype(np.float32)
    if type_name == "BF16":
        upper = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
        return upper.tobytes(), (upper.astype(np.uint32) << 16).view(np.float32)
    encoded, decoded = [], []
    for block in values.astype(np.float64).reshape(-1, 32):
        if type_name == "Q8_0":
            scale = float(np.float16(abs(block).max() / 127))
            codes = [max(-128, min(127, round(x / scale))) for x in block]
            encoded.append(struct.pack("<e32b", scale, *codes))
            decoded.append([scale * q for q in codes])
            continue
        minimum = float(np.float16(block.min())) if type_name == "Q4_1" else None
        spread = block.max() - block.min() if type_name == "Q4_1" else 2 * abs(block).max()
        scale = float(np.float16(spread / 15))
        offset = -8 * scale if minimum is None else minimum
        codes = [max(0, min(15, round((x - offset) / scale))) for x in block]
        head = struct.pack("<e", scale) + (b"" if minimum is None else struct.pack("<e", minimum))
        encoded.append(head + bytes(codes[i] | codes[i + 16] << 4 for i in range(16)))
        decoded.append([scale * q + offset for q in codes])
    return b"".join(encoded), np.array(decoded, dtype=np.float32).reshape(values.shape)


@dataclass
class GgufFile:
    """The contents of a GGUF file: metadata, and tensors as (type name, shape slowest dimension first, bytes)."""

    metadata: dict[Any, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)
    version: int = 3

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        header = b"GGUF" + struct.pack("<IQQ", self.version, len(self.tensors), len(self.metadata))
        header += b"".join(encode_string(key) + encode_value(value) for key, value in self.metadata.items())
        data = b""
        for name, (type_name, shape, raw) in self.tensors.items():
            header += encode_string(name) + struct.pack("<I", len(shape))
            header += struct.pack(f"<{len(shape)}Q", *shape[::-1])
            header += struct.pack("<IQ", TYPE_NUMBERS[type_name], len(data))
            data += raw + bytes(-len(raw) % 32)
        path.write_bytes(header + bytes(-len(header) % 32) + data)
        return path


def byte_symbols() -> list[str]:
    """Return GPT-2's 256 symbols, one for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    substitutes = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def vocabulary(**changes: Any) -> dict[str, Any]:
    """Return the `tokenizer.ggml.*` metadata of a byte-level tokenizer with a few merges.

    `changes` replaces values by the last part of their key; None removes one.
    """
    control = ["<|unknown|>", "<|start|>", "<|stop|>"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "Ġ Ġ"]
    tokens = [*control, *byte_symbols(), *[merge.replace(" ", "") for merge in merges], "<tool>"]
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3] * 3 + [1] * (len(tokens) - 4) + [4],
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
        "add_bos_token": False,
    } | changes
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return metadata | {"tokenizer.chat_template": CHAT_TEMPLATE}


def permute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows in llama.cpp's order: within a head, (2, head_dim / 2) becomes (head_dim / 2, 2)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@dataclass
class TinyLlama:
    """A llama model as a GGUF file, and the values of its tensors by mlx-lm's parameter names."""

    file: GgufFile
    expected: dict[str, np.ndarray]

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        return self.file.write(path)


def tiny_llama(
    types: dict[str, str] | None = None, *, biases: bool = False, tied: bool = True, **changes: Any
) -> TinyLlama:
    """Return a llama model of two blocks with random weights.

    Args:
        types: Type name by the matrix's stem, such as "attn_q"; F32 for the others.
        biases: Whether q, k and v have biases.
        tied: Whether the embeddings serve as the output matrix.
        changes: Metadata values by key, `__` in place of a dot; None removes one.
    """
    random = np.random.default_rng(0)
    tokenizer = vocabulary()
    vocabulary_size = len(tokenizer["tokenizer.ggml.tokens"])
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 256,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": HEAD_DIM,
    }
    metadata |= tokenizer | {key.replace("__", "."): value for key, value in changes.items()}
    llama = TinyLlama(GgufFile({key: value for key, value in metadata.items() if value is not None}), {})

    def add(source: str, target: str, shape: tuple[int, ...], heads: int = 0, mean: float = 0.0) -> None:
        stem, part = source.split(".")[-2:]
        type_name = (types or {}).get(stem, "F32") if part == "weight" else "F32"
        values = random.normal(mean, 0.3, shape)
        raw, decoded = encode_tensor(permute_rows(values, heads) if heads else values, type_name)
        llama.file.tensors[source] = (type_name, shape, raw)
        llama.expected[target] = encode_tensor(values, type_name)[1] if heads else decoded

    add("token_embd.weight", "model.embed_tokens.weight", (vocabulary_size, HIDDEN))
    for i in range(LAYERS):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        add(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight", (HIDDEN,), mean=1.0)
        add(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", (HIDDEN,), mean=1.0)
        matrices = [
            ("attn_q", "self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN, HEADS),
            ("attn_k", "self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN, KV_HEADS),
            ("attn_v", "self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN, 0),
            ("attn_output", "self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM, 0),
            ("ffn_gate", "mlp.gate_proj", INTERMEDIATE, HIDDEN, 0),
            ("ffn_up", "mlp.up_proj", INTERMEDIATE, HIDDEN, 0),
            ("ffn_down", "mlp.down_proj", HIDDEN, INTERMEDIATE, 0),
        ]
        for stem, name, rows, columns, heads in matrices:
            add(f"{block}.{stem}.weight", f"{layer}.{name}.weight", (rows, columns), heads)
            if biases and stem in ("attn_q", "attn_k", "attn_v"):
                add(f"{block}.{stem}.bias", f"{layer}.{name}.bias", (rows,), heads)
    add("output_norm.weight", "model.norm.weight", (HIDDEN,), mean=1.0)
    if not tied:
        add("output.weight", "lm_head.weight", (vocabulary_size, HIDDEN))
    return llama
