"""Damaged and hostile safetensors files are refused, quickly and in little memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.checkpoints.safetensors_file import Tensor, pack, read_header, unpack
from runner.common.errors import CheckpointError

ARRAYS = {
    "model.layers.0.lora_a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "scalar": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 5), dtype=np.float16),
    "flags": np.array([True, False, True]),
    "bytes": np.arange(7, dtype=np.uint8),
    "complex": np.array([1 + 2j], dtype=np.complex64),
    "naïve/\u4e2d": np.array([1.5, -2.5], dtype=np.float64),
}


def _packed(metadata: dict[str, str] | None = None) -> bytes:
    return pack({name: Tensor.of(array) for name, array in ARRAYS.items()}, metadata)


def _file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(begin: int, end: int, shape: list | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


BIG = 2**61
HOSTILE = {
    "nothing": (b"", "0 bytes are too few"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "too few"),
    "a pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94", "header would have"),
    "a 99,999,999-byte header": (_file(b"{}", length=99_999_999), "99,999,999 bytes"),
    "a header of 2**64 - 1 bytes": (b"\xff" * 8 + b"{}", "18,446,744,073,709,551,615"),
    "a header past the end": (_file(b"{}", length=3), "the file has 10"),
    "no header": (_file(b""), "does not start"),
    "a list": (_file(b"[]"), "does not start"),
    "a blank first": (_file(b" {}"), "does not start"),
    "cut JSON": (_file(b'{"a":'), "not JSON"),
    "two objects": (_file(b"{}{}"), "not JSON"),
    "not UTF-8": (_file(b'{"\xff":1}'), "not UTF-8"),
    "deep nesting": (_file(b'{"a":' + b"[" * 400_000), "nested too deeply"),
    "deep objects": (_file(b'{"a":' * 200_000), "nested too deeply"),
    "ten million brackets": (_file(b'{"a":' + b"[" * 9_900_000), "more than 500,000 values"),
    "millions of lists": (_file(b'{"a":[' + b"[]," * 3_000_000 + b"0]}"), "more than 500,000 values"),
    "half a million texts": (_file(b'{"a":[' + b'"ab",' * 499_000 + b"0]}"), "not described"),
    "half a million objects": (_file(b'{"a":[' + b"{}," * 249_000 + b"0]}"), "not described"),
    "half a million keys": (_file(b'{"aaaa":0' + b',"bb":0' * 499_000 + b"}"), "appears twice"),
    "a number of nine million digits": (_file(b'{"a":' + b"1" * 9_000_000 + b"}"), "digits"),
    "a fraction of nine million digits": (_file(b'{"a":0.' + b"1" * 9_000_000 + b"}"), "characters"),
    "an infinite number": (_file(b'{"a":1e999}'), "not finite"),
    "NaN": (_file(b'{"a":NaN}'), "not finite"),
    "a tensor that is a number": (_file({"a": 1}), "not described"),
    "a missing key": (_file({"a": {"dtype": "U8", "shape": []}}), "not described"),
    "a key too many": (_file({"a": _entry(0, 0) | {"x": 1}}), "not described"),
    "a key twice": (
        _file(b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"1"),
        "twice",
    ),
    "a name twice": (
        _file(b'{"a":' + json.dumps(_entry(0, 1)).encode() + b',"a":1}', b"1"),
        "'a' appears twice",
    ),
    "an unknown dtype": (_file({"a": _entry(0, 1, dtype="U7")}, b"1"), "unknown dtype 'U7'"),
    "a dtype that is a list": (
        _file({"a": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}),
        "unknown dtype",
    ),
    "a negative axis": (_file({"a": _entry(0, 1, [-1])}, b"1"), "whole numbers"),
    "two negative axes": (_file({"a": _entry(0, 1, [-1, -1])}, b"1"), "whole numbers"),
    "an axis of true": (_file({"a": _entry(0, 1, [True])}, b"1"), "whole numbers"),
    "an axis of 1.0": (_file({"a": _entry(0, 1, [1.0])}, b"1"), "whole numbers"),
    "too many axes": (_file({"a": _entry(0, 1, [1] * 65)}, b"1"), "up to 64"),
    "an overflowing shape": (_file({"a": _entry(0, 0, [BIG, 8])}), "overflows"),
    "a shape that wraps to one byte": (_file({"a": _entry(0, 1, [2**31 + 1] * 64)}, b"1"), "overflows"),
    "a huge axis": (_file({"a": _entry(0, 0, [2**63])}), "whole numbers"),
    "the wrong span": (_file({"a": _entry(0, 4, [2], "F32")}, b"1234"), "needs 8 bytes, its offsets span 4"),
    "offsets swapped": (_file({"a": _entry(4, 0, [4])}, b"1234"), "begin and an end"),
    "negative offsets": (_file({"a": _entry(-4, 0, [4])}, b"1234"), "begin and an end"),
    "three offsets": (
        _file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"1"),
        "begin and",
    ),
    "a hole": (_file({"a": _entry(0, 1), "b": _entry(2, 3)}, b"123"), "'b' leaves a hole"),
    "a hole in front": (_file({"a": _entry(1, 2)}, b"12"), "'a' leaves a hole"),
    "an overlap": (_file({"a": _entry(0, 2), "b": _entry(1, 3)}, b"123"), "'b' overlaps"),
    "the same bytes twice": (_file({"a": _entry(0, 2), "b": _entry(0, 2)}, b"12"), "'b' overlaps"),
    "bytes after the end": (_file({"a": _entry(0, 2)}, b"123"), "tensors end at byte"),
    "bytes missing at the end": (_file({"a": _entry(0, 4)}, b"123"), "tensors end at byte"),
    "metadata that is a list": (_file({"__metadata__": []}), "metadata"),
    "metadata of numbers": (_file({"__metadata__": {"a": 1}}), "metadata"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_its_path_and_the_reason(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    (tmp_path / "a.safetensors").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"^here: ") as caught:
            unpack(data, where="here")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: ") as again:
        read_header(tmp_path / "a.safetensors")
    assert message in str(caught.value)
    assert message in str(again.value)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()
    assert peak < 200e6


def test_a_header_of_the_largest_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.write((99_999_999).to_bytes(8, "little") + b"{")
        file.truncate(100_000_007)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="99,999,999"):
        read_header(tmp_path / "a")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def _refuses_or_reads(data: bytes) -> bool:
    try:
        found, _ = unpack(data, where="here")
    except CheckpointError:
        return False
    for one in found.values():
        one.array()
    return True


def test_any_one_flipped_bit_of_a_header_is_refused_or_harmless() -> None:
    whole = _packed({"format": "mlx"})
    end = 8 + int.from_bytes(whole[:8], "little")
    outcomes = set()
    for bit in range(end * 8):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        outcomes.add(_refuses_or_reads(bytes(data)))
    assert outcomes == {True, False}


def test_every_truncation_is_refused() -> None:
    whole = _packed({"format": "mlx"})
    assert not any(_refuses_or_reads(whole[:length]) for length in range(len(whole)))


def test_random_damage_never_raises_anything_but_a_checkpoint_error() -> None:
    rng, whole = random.Random(0), _packed({"format": "mlx"})
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 3)] = rng.choice(
                [b"", b"[", b"}", b'"', b"9", b"-", bytes([rng.randrange(256)])]
            )
        _refuses_or_reads(bytes(data))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), _JSON), st.binary(max_size=16))
@settings(deadline=None, max_examples=60)
def test_any_json_header_is_read_or_refused(header: dict, data: bytes) -> None:
    _refuses_or_reads(_file(header, data))
