"""Safetensors bytes: what is written is read by others, what is damaged or hostile is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as reference_load
from safetensors.numpy import save as reference_save

from runner.checkpoints import safetensors_file
from runner.checkpoints.safetensors_file import ITEM_BYTES, Tensor, pack, read_header, unpack
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


def test_packed_tensors_are_unpacked_unchanged() -> None:
    found, metadata = unpack(_packed({"format": "mlx", "é": "\u4e2d"}), where="here")
    assert metadata == {"format": "mlx", "é": "\u4e2d"}
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].array().dtype == array.dtype
        np.testing.assert_array_equal(found[name].array(), array)
        assert found[name].array().shape == array.shape


def test_the_library_reads_what_is_packed() -> None:
    found = reference_load(_packed({"format": "mlx"}))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def test_what_the_library_writes_is_read() -> None:
    found, metadata = unpack(reference_save(dict(ARRAYS), metadata={"format": "np"}), where="here")
    assert metadata == {"format": "np"}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name].array(), array)


def test_mlx_reads_what_is_packed_and_what_mlx_writes_is_read(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    bits = np.array([0x3F80, 0xC000, 0x0001], dtype=np.uint16)
    ours = {name: Tensor.of(array) for name, array in ARRAYS.items() if name != "naïve/\u4e2d"}
    ours["half"] = Tensor.of(bits, "BF16")
    (tmp_path / "ours.safetensors").write_bytes(pack(ours, {"format": "mlx"}))
    found, metadata = mx.load(str(tmp_path / "ours.safetensors"), return_metadata=True)
    assert metadata["format"] == "mlx"
    assert found.keys() == ours.keys()
    assert found["half"].dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(found["half"].view(mx.uint16)), bits)
    np.testing.assert_array_equal(np.array(found["model.layers.0.lora_a"]), ARRAYS["model.layers.0.lora_a"])

    mx.save_safetensors(str(tmp_path / "theirs.safetensors"), found, {"format": "mlx"})
    back, metadata = unpack((tmp_path / "theirs.safetensors").read_bytes(), where="here")
    assert metadata == {"format": "mlx"}
    assert {name: (one.dtype, one.shape, bytes(one.data)) for name, one in back.items()} == {
        name: (one.dtype, one.shape, bytes(one.data)) for name, one in ours.items()
    }


def test_the_same_tensors_in_another_order_give_the_same_bytes() -> None:
    made = {name: Tensor.of(array) for name, array in ARRAYS.items()}
    other = dict(reversed(made.items()))
    assert pack(made, {"a": "1", "b": "2"}) == pack(other, {"b": "2", "a": "1"})


def test_each_tensor_is_aligned_to_its_items(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(_packed())
    spans, _ = read_header(tmp_path / "a")
    assert all(span.begin % ITEM_BYTES[span.dtype] == 0 for span in spans.values())


def test_big_endian_and_strided_arrays_are_stored_in_order() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    found, _ = unpack(pack({"a": Tensor.of(array)}), where="here")
    np.testing.assert_array_equal(found["a"].array(), array)


def test_unpacked_tensors_are_read_only_views() -> None:
    data = bytearray(_packed())
    found, _ = unpack(data, where="here")
    with pytest.raises(ValueError, match="read-only"):
        found["bytes"].array()[0] = 1
    with pytest.raises(TypeError):
        found["bytes"].data[0] = 1  # type: ignore[index]


def test_an_array_of_a_type_that_safetensors_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        Tensor.of(np.array(["text"]))
    with pytest.raises(ValueError, match="cannot be stored as BF16"):
        Tensor.of(np.zeros(3, np.float32), "BF16")


@pytest.mark.parametrize(
    ("dtype", "bits", "finite"),
    [
        ("BF16", [0x7F7F, 0x0000, 0xFF7F], True),
        ("BF16", [0, 0x7F80], False),
        ("BF16", [0, 0xFFC0], False),
        ("F8_E4M3", [0x7E, 0xFE], True),
        ("F8_E4M3", [0xFF], False),
        ("F8_E5M2", [0x7B], True),
        ("F8_E5M2", [0xFC], False),
    ],
)
def test_finiteness_of_types_that_numpy_lacks(dtype: str, bits: list[int], finite: bool) -> None:
    array = np.array(bits, dtype=np.uint16 if dtype == "BF16" else np.uint8)
    assert Tensor.of(array, dtype).is_finite() is finite


def test_finiteness_of_types_that_numpy_has() -> None:
    assert all(Tensor.of(array).is_finite() for array in ARRAYS.values())
    assert not Tensor.of(np.array([1.0, np.inf], np.float32)).is_finite()
    assert not Tensor.of(np.array([1.0, np.nan], np.float16)).is_finite()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"a": Tensor("U8", (2,), b"123")}, "needs 2 bytes, its offsets span 3"),
        ({"a": Tensor("X9", (2,), b"12")}, "unknown dtype"),
        ({"a": Tensor("U8", (-2,), b"12")}, "whole numbers"),
        ({"__metadata__": Tensor("U8", (2,), b"12")}, "cannot be named"),
    ],
)
def test_tensors_that_could_not_be_read_back_are_not_packed(made: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(made)


def test_a_header_is_read_from_a_regular_file_or_a_link_to_one_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(_packed({"k": "v"}))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    spans, metadata = read_header(tmp_path / "link")
    assert metadata == {"k": "v"}
    whole = _packed({"k": "v"})
    found, _ = unpack(whole, where="here")
    assert {name: bytes(one.data) for name, one in found.items()} == {
        name: whole[span.begin : span.end] for name, span in spans.items()
    }
    os.mkfifo(tmp_path / "fifo")
    for wrong, message in (("fifo", "not a regular"), ("none", "no such file"), (".", "not a regular")):
        with pytest.raises(CheckpointError, match=message):
            read_header(tmp_path / wrong)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(sorted(safetensors_file._NAMES.values())),
            st.lists(st.integers(0, 4), max_size=3),
            st.randoms(),
        ),
        max_size=5,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)
@settings(deadline=None)
def test_any_tensors_are_unpacked_unchanged_and_read_by_the_library(made: dict, metadata: dict[str, str]) -> None:
    packed = {}
    for name, (dtype, shape, rng) in made.items():
        items = int(np.prod(shape, dtype=int))
        data = bytes(items) if dtype == "BOOL" else rng.randbytes(items * ITEM_BYTES[dtype])
        packed[name] = Tensor(dtype, tuple(shape), data)
    whole = pack(packed, metadata)
    found, told = unpack(whole, where="here")
    assert told == metadata
    assert {name: (one.dtype, one.shape, bytes(one.data)) for name, one in found.items()} == {
        name: (one.dtype, one.shape, one.data) for name, one in packed.items()
    }
    for name, array in reference_load(whole).items():
        assert array.tobytes() == packed[name].data
