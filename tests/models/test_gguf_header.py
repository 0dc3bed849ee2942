"""Every claim of a GGUF header is checked against the bytes of the file."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import system
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.common.errors import ModelError
from runner.models.gguf.header import read_header

GIB = 1 << 30


def start(tensors: int = 0, keys: int = 1, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def tensor(name: bytes = b"t", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def array(kind: int, count: int) -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, kind, count)


ALIGNED = text(b"general.alignment") + struct.pack("<I", 4)
HOSTILE = {
    "empty": (b"", "magic number"),
    "other magic": (b"GGML" + bytes(60), "b'GGML'"),
    "a zip": (b"PK\3\4" + bytes(60), "begins with"),
    "version 1": (start(version=1), "version 1 is not supported"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
    "2^63 keys": (start(keys=1 << 63), "metadata keys"),
    "2^63 tensors": (start(tensors=1 << 63, keys=0), "tensors"),
    "more keys than bytes": (start(keys=60_000), "past the end"),
    "key past the end": (start() + struct.pack("<Q", 1 << 62) + b"k", "past the end"),
    "text past the end": (start() + text(b"k") + struct.pack("<IQ", 8, GIB), "past the end"),
    "array past the end": (start() + array(4, 1 << 61), "past the end"),
    "2^63 texts": (start() + array(8, 1 << 63), "strings"),
    "texts past the end": (start() + array(8, 690_000), "past the end"),
    "array of arrays": (start() + array(9, 1) + struct.pack("<IQ", 9, 1) * 1000, "array of arrays"),
    "unknown type": (start() + text(b"k") + struct.pack("<I", 77), "unknown type 77"),
    "array of an unknown type": (start() + array(77, 1) + bytes(8), "unknown type 77"),
    "boolean of 2": (start() + text(b"k") + struct.pack("<IB", 7, 2), "boolean of 2"),
    "not UTF-8": (start() + text(b"\xff\xfe") + struct.pack("<II", 4, 1), "not UTF-8"),
    "key twice": (start(keys=2) + (text(b"k") + struct.pack("<II", 4, 1)) * 2, "'k' appears twice"),
    "alignment 0": (start() + ALIGNED + struct.pack("<I", 0), "general.alignment is 0"),
    "alignment 24": (start() + ALIGNED + struct.pack("<I", 24), "general.alignment is 24"),
    "alignment 2^31": (start() + ALIGNED + struct.pack("<I", 1 << 31), "general.alignment"),
    "no dimension": (start(1, 0) + text(b"t") + struct.pack("<I", 0) + bytes(64), "0 dimensions"),
    "2^31 dimensions": (start(1, 0) + text(b"t") + struct.pack("<I", 1 << 31) + bytes(64), "dimensions"),
    "dimension 0": (start(1, 0) + tensor(shape=(0,)) + bytes(64), "invalid shape"),
    "overflowing shape": (start(1, 0) + tensor(shape=(1 << 32, 1 << 32)) + bytes(64), "past the end"),
    "uneven blocks": (start(1, 0) + tensor(shape=(33,), kind=8) + bytes(128), "invalid shape"),
    "IQ2_XXS": (
        start(1, 0) + tensor(shape=(256,), kind=16),
        "'t' is of ggml type IQ2_XXS.*supported: F32.*safetensors",
    ),
    "uneven K-quant": (start(1, 0) + tensor(shape=(288, 2), kind=12) + bytes(9999), "Q4_K has the invalid shape"),
    "K-quant cut short": (start(1, 0) + tensor(shape=(256, 2), kind=14) + bytes(2 * 210 - 1), "past the end"),
    "unknown tensor type": (start(1, 0) + tensor(kind=4711), "ggml type number 4711"),
    "tensor twice": (start(2, 0) + tensor() + tensor(offset=32) + bytes(128), "'t' appears twice"),
    "tensors overlap": (start(2, 0) + tensor(shape=(16,)) + tensor(b"u", offset=32) + bytes(128), "overlap"),
    "tensor unaligned": (start(1, 0) + tensor(offset=4) + bytes(128), "not aligned"),
    "tensor far away": (start(1, 0) + tensor(offset=1 << 62) + bytes(128), "past the end"),
    "data cut short": (start(1, 0) + tensor(shape=(64,)) + bytes(128), "past the end"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_with_file_and_reason(tmp_path: Path, name: str) -> None:
    raw, reason = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(ModelError, match=rf"bad\.gguf: .*{reason}"):
        read_header(path)


@pytest.mark.skipif(system.SIMULATED, reason="simulated: ru_maxrss counts what the process was before exec")
def test_the_largest_headers_are_read_or_refused_within_200_mb(tmp_path: Path) -> None:
    wide = "\U0001f600".encode()  # one such character makes Python store a string in four bytes per character
    (tmp_path / "texts.gguf").write_bytes(
        start() + array(8, 690_000) + text(wide + b"x" * 22) * 690_000 + bytes(64 << 20)
    )
    (tmp_path / "long.gguf").write_bytes(start() + text(b"k") + struct.pack("<I", 8) + text(wide + bytes(40 << 20)))
    (tmp_path / "fits.gguf").write_bytes(start() + text(b"k") + struct.pack("<I", 8) + text(wide + bytes(23 << 20)))
    (tmp_path / "numbers.gguf").write_bytes(start() + array(0, 40 << 20) + bytes(41 << 20))
    (tmp_path / "keys.gguf").write_bytes(
        start(keys=65_536) + b"".join(text(b"%d" % i) + struct.pack("<IB", 0, 1) for i in range(65_536))
    )
    program = """
import resource, sys
from pathlib import Path
from runner.common.errors import ModelError
from runner.models.gguf.header import read_header
for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
    try:
        print(path.stem, len(read_header(path).metadata))
    except ModelError as error:
        print(path.stem, "refused")
try:  # ru_maxrss counts what the process was before exec, on Linux
    status = Path("/proc/self/status").read_text()
    print("MB", int(status.partition("VmHWM:")[2].split()[0]) >> 10)
except OSError:
    print("MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    *found, peak = done.stdout.splitlines()
    assert found == ["fits 1", "keys 65536", "long refused", "numbers refused", "texts 1"]
    assert int(peak.removeprefix("MB ")) < 200


def test_a_file_truncated_at_any_length_is_refused(gguf_files: ModuleType, tmp_path: Path) -> None:
    path = gguf_files.tiny_llama().write(tmp_path / "whole.gguf")
    whole = path.read_bytes()
    read_header(path)
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 2000, 7), *np.linspace(2000, len(whole) - 33, 200, dtype=int)]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            read_header(cut)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 700), byte=st.integers(0, 255))
def test_a_changed_byte_loads_or_raises_a_model_error(
    gguf_files: ModuleType, tmp_path: Path, position: int, byte: int
) -> None:
    whole = tmp_path / "whole.gguf"
    if not whole.exists():
        gguf_files.tiny_llama().write(whole)
    raw = bytearray(whole.read_bytes())
    raw[position] = byte
    path = tmp_path / "changed.gguf"
    path.write_bytes(raw)
    try:
        read_header(path)
    except ModelError as error:
        assert "changed.gguf" in str(error)


def test_metadata_and_tensors_are_read_as_written(gguf_files: ModuleType, tmp_path: Path) -> None:
    raw = np.arange(6, dtype="<f4").tobytes()
    metadata = {"yes": True, "n": 7, "x": 0.5, "s": "é", "texts": ["a", ""], "numbers": [3, -4]}
    file = gguf_files.GgufFile(metadata, {"m": ("F32", (2, 3), raw), "h": ("F16", (6,), bytes(12))}, version=2)
    header = read_header(file.write(tmp_path / "a.gguf"))
    numbers = header.metadata.pop("numbers")
    assert isinstance(numbers, np.ndarray) and numbers.tolist() == [3, -4]
    assert header.metadata == {key: item for key, item in metadata.items() if key != "numbers"}
    assert header.metadata["yes"] is True
    first = header.tensors["m"]
    assert (first.shape, first.type_name, first.nbytes) == ((2, 3), "F32", 24)
    assert (tmp_path / "a.gguf").read_bytes()[first.start : first.start + 24] == raw
    assert header.tensors["h"].start == first.start + 32


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelError, match=f"{path}: no such file"):
            read_header(path)
