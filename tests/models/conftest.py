"""GGUF files made on the spot: a small writer of its own, and a llama of random weights to write with it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "BF16": 30}
HEADS, KV_HEADS, WIDTH, HIDDEN, INNER, LAYERS = 4, 2, 16, 64, 96, 2


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """Type number and bytes of one metadata value; bytes pass as they are."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, bool):
        return struct.pack("<IB", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if all(isinstance(part, str) for part in item):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
    return struct.pack("<IIQ", 9, 5, len(item)) + np.asarray(item, "<i4").tobytes()


def encode(values: np.ndarray, kind: str) -> tuple[bytes, np.ndarray]:
    """`values` (rows, columns) as bytes of `kind`, block by block, and the values these bytes stand for."""
    if kind == "F32":
        return values.astype("<f4").tobytes(), values.astype(np.float32)
    if kind == "F16":
        return values.astype("<f2").tobytes(), values.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        upper = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
        return upper.tobytes(), (upper.astype(np.uint32) << 16).view(np.float32)
    out, meant = [], []
    for block in values.astype(np.float64).reshape(-1, 32):
        if kind == "Q8_0":
            scale = float(np.float16(abs(block).max() / 127))
            codes = [max(-128, min(127, round(x / scale))) for x in block]
            out.append(struct.pack("<e32b", scale, *codes))
            meant.append([scale * q for q in codes])
            continue
        low = float(np.float16(block.min())) if kind == "Q4_1" else None
        spread = block.max() - block.min() if kind == "Q4_1" else 2 * abs(block).max()
        scale = float(np.float16(spread / 15))
        offset = -8 * scale if low is None else low
        codes = [max(0, min(15, round((x - offset) / scale))) for x in block]
        head = struct.pack("<e", scale) + (b"" if low is None else struct.pack("<e", low))
        out.append(head + bytes(codes[i] | codes[i + 16] << 4 for i in range(16)))
        meant.append([scale * q + offset for q in codes])
    return b"".join(out), np.array(meant, dtype=np.float32).reshape(values.shape)


@dataclass
class GgufFile:
    """What to write: metadata, and tensors as (kind, shape slowest first, bytes)."""

    metadata: dict[Any, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)
    version: int = 3

    def write(self, path: Path) -> Path:
        head = b"GGUF" + struct.pack("<IQQ", self.version, len(self.tensors), len(self.metadata))
        head += b"".join(string(key) + value(item) for key, item in self.metadata.items())
        data = b""
        for name, (kind, shape, raw) in self.tensors.items():
            head += string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
            head += struct.pack("<IQ", KINDS[kind], len(data))
            data += raw + bytes(-len(raw) % 32)
        path.write_bytes(head + bytes(-len(head) % 32) + data)
        return path


def byte_letters() -> list[str]:
    """GPT-2's 256 letters, one a byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


CHAT_TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>{% endfor %}"


def vocabulary(**changes: Any) -> dict[str, Any]:
    """`tokenizer.ggml.*` of a byte-level tokenizer with a few merges; `changes` by the key's last part."""
    control = ["<|end|>", "<|start|>", "<|stop|>"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "Ġ Ġ"]
    tokens = [*control, *byte_letters(), *[merge.replace(" ", "") for merge in merges], "<tool>"]
    keys = {
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
    named = {f"tokenizer.ggml.{key}": item for key, item in keys.items() if item is not None}
    return named | {"tokenizer.chat_template": CHAT_TEMPLATE}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: within a head (2, d/2) becomes (d/2, 2)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@dataclass
class TinyLlama:
    """A file and, by mlx-lm's names, the values that its tensors stand for."""

    file: GgufFile
    expected: dict[str, np.ndarray]

    def write(self, path: Path) -> Path:
        return self.file.write(path)


def tiny_llama(
    kinds: dict[str, str] | None = None, *, biases: bool = False, tied: bool = True, **metadata: Any
) -> TinyLlama:
    """Two blocks of random weights; `kinds` by the tensor's stem ("attn_q"), F32 where none is given."""
    random = np.random.default_rng(0)
    words = vocabulary()
    size = len(words["tokenizer.ggml.tokens"])
    about: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 256,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": WIDTH,
    }
    given = {key.replace("__", "."): item for key, item in metadata.items()}
    about = {key: item for key, item in (about | words | given).items() if item is not None}
    made = TinyLlama(GgufFile(about), {})

    def add(source: str, target: str, shape: tuple[int, ...], heads: int = 0, around: float = 0.0) -> None:
        stem, part = source.split(".")[-2:]
        kind = (kinds or {}).get(stem, "F32") if part == "weight" else "F32"
        hub = random.normal(around, 0.3, shape)
        raw, held = encode(permuted(hub, heads) if heads else hub, kind)
        made.file.tensors[source] = (kind, shape, raw)
        made.expected[target] = encode(hub, kind)[1] if heads else held

    add("token_embd.weight", "model.embed_tokens.weight", (size, HIDDEN))
    for i in range(LAYERS):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        add(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight", (HIDDEN,), around=1.0)
        add(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", (HIDDEN,), around=1.0)
        parts = [
            ("attn_q", "self_attn.q_proj", HEADS * WIDTH, HIDDEN, HEADS),
            ("attn_k", "self_attn.k_proj", KV_HEADS * WIDTH, HIDDEN, KV_HEADS),
            ("attn_v", "self_attn.v_proj", KV_HEADS * WIDTH, HIDDEN, 0),
            ("attn_output", "self_attn.o_proj", HIDDEN, HEADS * WIDTH, 0),
            ("ffn_gate", "mlp.gate_proj", INNER, HIDDEN, 0),
            ("ffn_up", "mlp.up_proj", INNER, HIDDEN, 0),
            ("ffn_down", "mlp.down_proj", HIDDEN, INNER, 0),
        ]
        for stem, name, rows, columns, heads in parts:
            add(f"{block}.{stem}.weight", f"{layer}.{name}.weight", (rows, columns), heads)
            if biases and stem in ("attn_q", "attn_k", "attn_v"):
                add(f"{block}.{stem}.bias", f"{layer}.{name}.bias", (rows,), heads)
    add("output_norm.weight", "model.norm.weight", (HIDDEN,), around=1.0)
    if not tied:
        add("output.weight", "lm_head.weight", (size, HIDDEN))
    return made


@pytest.fixture(name="tiny_llama")
def _tiny_llama() -> Callable[..., TinyLlama]:
    return tiny_llama


@pytest.fixture(name="vocabulary")
def _vocabulary() -> Callable[..., dict[str, Any]]:
    return vocabulary


@pytest.fixture(name="gguf_file")
def _gguf_file() -> Callable[..., GgufFile]:
    return GgufFile


@pytest.fixture(scope="session")
def recorded() -> dict[str, Any]:
    """What other readers of the small model's file found; see reference/make_reference.py."""
    path = Path(__file__).parent / "reference" / "smollm2_135m.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The small model's GGUF file."""
    from runner.models.fetch import fetch

    return fetch("smollm2_135m")
