"""Native kernels against NumPy's, and the fallback where they cannot be compiled or are wrong."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest

from runner.backends import c_library
from runner.backends.c_library import COMPILERS
from runner.backends.cpu import native
from runner.backends.cpu.attention import HeadLayout
from runner.backends.cpu.kernels import Ops
from runner.backends.cpu.native import NativeOps
from runner.backends.cpu.partitions import PackedRows, Partition
from runner.backends.cpu.workspace import Workspace

HERE = [found for name in COMPILERS if (found := shutil.which(name))]
pytestmark = pytest.mark.skipif(not HERE or sys.platform != "linux", reason="needs Linux and a C compiler")
ROOT = Path(__file__).parents[3]
LIMITS = [0.0, -0.0, 1e-30, -87.3, -87.34, -1000.0, 88.0, 88.4, 1e4, np.inf, -np.inf, np.nan]


@pytest.fixture(scope="module")
def ours() -> NativeOps:
    found, why = native.load()
    assert found is not None, why
    return found


def numbers(*shape: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def close(found: np.ndarray, expected: np.ndarray, by: float = 2e-6) -> None:
    assert np.abs(found - expected).max() <= by * np.abs(expected).max()


# Lengths below, at and beside those of the vectors.
@pytest.mark.parametrize("d", [1, 7, 16, 33, 576, 1537])
def test_norms_swiglu_and_their_gradients_equal_numpys(ours: NativeOps, d: int) -> None:
    x, weight, given = numbers(5, d), numbers(d, seed=1), numbers(5, d, seed=2)
    made = []
    for ops in (ours, Ops()):
        out, scale, total, by = np.empty_like(x), np.empty((5, 1), np.float32), numbers(5, d, seed=3), given.copy()
        ops.rms_norm(x, weight, 1e-5, out, scale)
        ops.rms_norm_backward(x, weight, scale, by, total)
        gate_up, inner = np.concatenate([x, given], axis=1), np.empty_like(x)
        ops.swiglu(gate_up, inner)
        again = np.empty_like(x)
        ops.swiglu_backward(gate_up, numbers(5, d, seed=4), again)
        close(again, inner, 1e-6)
        dots, sums, rows = np.empty((5, 1), np.float32), np.empty(5, np.float32), x.copy()
        ops.row_dots(x[:, None], given[:, None], dots)
        ops.exp_minus_max(rows, x.max(axis=1), sums)
        made.append((out, scale, total, inner, gate_up, dots, sums, rows))
    for found, expected in zip(*made, strict=True):
        close(found, expected)


def test_exp_is_accurate_to_the_last_digits_and_at_its_limits(ours: NativeOps) -> None:
    x = np.linspace(-87, 0, 100_003, dtype=np.float32)[None]
    exact, sums = np.exp(x.astype(np.float64)), np.empty(1, np.float32)
    ours.exp_minus_max(x, np.zeros(1, np.float32), sums)
    assert np.abs(x / exact - 1).max() < 2.5e-7
    assert sums[0] == pytest.approx(exact.sum(), rel=1e-7)
    odd = np.array([LIMITS], np.float32)
    ours.exp_minus_max(odd, np.zeros(1, np.float32), sums)
    with np.errstate(over="ignore"):
        expected = np.exp(np.array(LIMITS, np.float64))
    assert np.isnan(odd[0, -1]) and odd[0, -2] == odd[0, 5] == 0 and np.isinf(odd[0, 7:-2]).all()
    assert np.allclose(odd[0, :7], expected[:7], rtol=3e-7, atol=1.2e-38)


def test_swiglu_of_a_gate_far_from_zero(ours: NativeOps) -> None:
    gates = [-3e38, -1e4, -90, 90, 1e4]
    gate_up, out = np.array([[*gates, 2, 2, 2, 2, 2]], np.float32), np.empty((1, 5), np.float32)
    ours.swiglu(gate_up, out)
    assert np.allclose(out, [[0, 0, 0, 180, 2e4]], atol=1e-30)
    ours.swiglu_backward(gate_up, np.ones((1, 5), np.float32), out)
    assert np.allclose(gate_up, [[0, 0, 0, 2, 2, 0, 0, 0, 90, 1e4]], atol=1e-30)
    assert np.allclose(out, [[0, 0, 0, 180, 2e4]], atol=1e-30)
    endless = np.array([[-np.inf, 1]], np.float32)
    ours.swiglu(endless, out[:, :1])
    assert np.isnan(out[0, 0]), "what is no number shows"


def test_many_small_numbers_are_not_lost_in_a_sum_with_a_large_one(ours: NativeOps) -> None:
    x, sums = np.full((1, 49152), np.log(1e-8), np.float32), np.empty(1, np.float32)
    x[0, 100] = 0
    ours.exp_minus_max(x, np.zeros(1, np.float32), sums)
    assert sums[0] == pytest.approx(1 + 49151e-8, rel=1e-7)


@pytest.mark.parametrize("half", [4, 13, 32])
def test_rope_and_its_inverse_equal_numpys(ours: NativeOps, half: int) -> None:
    angles = numbers(20, half)
    cos, sin, places = np.cos(angles), np.sin(angles), np.array([3, 0, 19, 7])
    lines = numbers(4, 6 * (2 * half + 3))
    turned = []
    for ops in (ours, Ops()):
        whole = lines.copy()
        heads = whole.reshape(4, 6, -1)[:, :5]  # a width of more than is turned, and a head that is left alone
        ops.rope(heads, cos, sin, places)
        turned.append(whole.copy())
        ops.rope(heads, cos, sin, places, inverse=True)
        close(whole, lines, 1e-6)
    close(*turned)
    assert not np.array_equal(turned[0], lines)


def partition_of(lengths: list[int], ops: Ops, number: int = 0, count: int = 1) -> Partition:
    return Partition(number, count, PackedRows(lengths), Workspace(), Workspace(), Barrier(1))


def attended(ops: Ops, shape: HeadLayout, lengths: list[int], count: int = 1) -> list[np.ndarray]:
    """What both ways of attention write, by `count` lanes one after the other."""
    n, own = sum(lengths), shape.heads * shape.width
    qkv, by_out = numbers(n, shape.columns, scale=1), numbers(n, own, seed=1)
    out, sums = np.full((n, own), np.nan, np.float32), np.full((n, shape.heads), np.nan, np.float32)
    by_qkv, deltas = np.full((n, shape.columns), np.nan, np.float32), np.empty((n, shape.heads), np.float32)
    for number in range(count):
        ops.attention(qkv, shape, partition_of(lengths, ops, number, count), out, sums)
    heads = n, shape.heads, shape.width
    ops.row_dots(out.reshape(heads), by_out.reshape(heads), deltas)
    for number in range(count):
        ops.attention_backward(qkv, shape, partition_of(lengths, ops, number, count), deltas, sums, by_out, by_qkv)
    return [out, sums, by_qkv]


@pytest.mark.parametrize("shape", [HeadLayout(9, 3, 64, 0.125), HeadLayout(4, 4, 8, 0.3), HeadLayout(8, 1, 20, 0.2)])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 40], [300, 33, 129]])
def test_attention_and_its_gradients_equal_numpys(ours: NativeOps, shape: HeadLayout, lengths: list[int]) -> None:
    for found, expected in zip(attended(ours, shape, lengths, 2), attended(Ops(), shape, lengths), strict=True):
        close(found, expected, 5e-6)


def test_a_nan_is_propagated(ours: NativeOps) -> None:
    shape, qkv = HeadLayout(2, 1, 8, 0.3), numbers(6, 32)
    qkv[3, 0] = np.nan
    out, sums = np.empty((6, 16), np.float32), np.empty((6, 2), np.float32)
    ours.attention(qkv, shape, partition_of([6], ours), out, sums)
    assert np.isnan(sums[3, 0]) and np.isnan(out[3, :8]).all()
    assert np.isfinite(np.delete(out, 3, axis=0)).all()


def everything(ops: Ops) -> list[bytes]:
    """The bits of what each function makes: rows of several tiles, lengths that no vector divides."""
    x, given = numbers(3, 577), numbers(3, 577, seed=1)
    out, scale, gate_up = np.empty_like(x), np.empty((3, 1), np.float32), np.concatenate([x, given], axis=1)
    ops.rms_norm(x, given[0], 1e-5, out, scale)
    ops.rms_norm_backward(x, given[0], scale, given, out)
    gated, inner, sums = np.empty_like(x), np.empty_like(x), np.empty(3, np.float32)
    ops.swiglu(gate_up, gated)
    ops.swiglu_backward(gate_up, given, inner)
    ops.exp_minus_max(x, x.max(axis=1), sums)
    heads, angles = numbers(3, 5, 26), numbers(9, 13)
    ops.rope(heads, np.cos(angles), np.sin(angles), np.array([8, 0, 3]))
    apart = [out, scale, gate_up, gated, inner, x, sums, heads]
    return [array.tobytes() for array in (*apart, *attended(ops, HeadLayout(9, 3, 64, 0.125), [200, 9, 90], 2))]


@pytest.mark.parametrize("compiler", sorted({Path(found).name for found in HERE} & {"gcc", "clang", "cc"}))
@pytest.mark.parametrize("flags", [[], ["-march=x86-64-v3"], ["-O0"]])
def test_results_are_bitwise_independent_of_compiler_and_vector_width(
    ours: NativeOps, compiler: str, flags: list[str], tmp_path: Path
) -> None:
    if flags == ["-march=x86-64-v3"] and platform.machine() != "x86_64":
        flags = []
    plain = [*native.FLAGS, *flags]
    source = str(native.SOURCE)
    words = [compiler, *plain, "-shared", "-fPIC", "-nostdlib", "-x", "c", source, "-o", str(tmp_path / "other.so")]
    subprocess.run(words, check=True)
    other = NativeOps(ctypes.CDLL(str(tmp_path / "other.so")))
    assert everything(other) == everything(ours)


CHILD = """
import json
import os
from runner.backends import blas
blas.load_blas()
from runner.backends.cpu import native
found, why = native.load()
print(json.dumps([found is not None, why]))
"""


def child(cache: Path, **extra: str) -> list:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RUNNER_")}
    own |= {"RUNNER_CACHE": str(cache), "PYTHONPATH": str(ROOT)} | extra
    done = subprocess.run([sys.executable, "-c", CHILD], env=own, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_library_is_compiled_once_and_again_if_it_is_damaged(tmp_path: Path) -> None:
    assert child(tmp_path) == [True, ""]
    (built,) = tmp_path.glob("native-*.so")
    first, whole = built.stat().st_mtime_ns, built.read_bytes()
    assert child(tmp_path) == [True, ""] and built.stat().st_mtime_ns == first
    for damaged in (whole[:3000], whole[:-2000] + bytes(2000), b""):
        built.write_bytes(damaged)
        assert child(tmp_path) == [True, ""] and built.read_bytes() == whole


def test_without_a_compiler_the_reason_is_returned(tmp_path: Path) -> None:
    assert child(tmp_path) == [True, ""]  # whatever the BLAS needs is compiled as well, and stays
    (built,) = tmp_path.glob("native-*.so")
    built.unlink()
    found, why = child(tmp_path, PATH=str(tmp_path))
    assert not found and "no C compiler" in why


def test_a_cache_that_cannot_be_written_or_executed_from_is_replaced_by_a_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    assert child(in_the_way) == [True, ""]
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "noexec"))
    own = c_library._loads
    monkeypatch.setattr(c_library, "_loads", lambda path: "noexec" not in str(path) and own(path))
    assert native.load.__wrapped__()[0] is not None


def test_other_files_under_the_name_of_the_library_are_skipped(tmp_path: Path) -> None:
    assert child(tmp_path) == [True, ""]
    (built,) = tmp_path.glob("native-*.so")
    start = built.name.split(".")[0]
    os.mkfifo(tmp_path / f"{start}.0.so")
    (tmp_path / f"{start}.1.so").mkdir()
    (tmp_path / f"{start}.2.so").symlink_to(tmp_path / "nowhere")
    with (tmp_path / f"{start}.3.so").open("wb") as file:
        file.truncate(1 << 40)
    assert child(tmp_path) == [True, ""]
    assert len(list(tmp_path.glob("native-*.so"))) == 5


def test_a_wrongly_compiled_library_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path))
    wrong = tmp_path / "native.c"
    wrong.write_text(native.SOURCE.read_text().replace("+ 127) << 23", "+ 126) << 23"))
    monkeypatch.setattr(native, "SOURCE", wrong)
    found, why = native.load.__wrapped__()
    assert found is None and "wrong results" in why
    assert not list(tmp_path.glob("native-*.so"))


WRONG = {
    "attend": ("log_(sums[q_row]) + top", "log_(sums[q_row]) + top * 1.001f"),
    "a tile's keys": ("grad_rows + key, columns", "grad_rows + key + (start ? 1 : 0), columns"),
    "norm": ("/ (float)d + eps)", "/ (float)d + 2.0f * eps)"),
    "rotate": ("b * c[i] + a * sine", "b * c[i] - a * sine"),
    "sums": ("sums[at] = total(row, d);", "sums[at] = total(row, d - 1);"),
    "dots": ("out[at] = dot(a + at * d, b + at * d, d);", "out[at] = dot(a + at * d, b, d);"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_each_kernel_is_verified_before_it_is_used(name: str, tmp_path: Path) -> None:
    source, (right, wrong) = native.SOURCE.read_text(), WRONG[name]
    assert source.count(right) == 1
    (tmp_path / "wrong.c").write_text(source.replace(right, wrong))
    words = [HERE[0], *native.FLAGS, "-shared", "-fPIC", "-nostdlib", "-o", "wrong.so", "wrong.c"]
    subprocess.run(words, check=True, cwd=tmp_path)
    assert not native._is_correct(NativeOps(ctypes.CDLL(str(tmp_path / "wrong.so"))))


def test_partitions_share_one_layout_structure(ours: NativeOps) -> None:
    before = len(ours._layouts)
    for _ in range(3):
        attended(ours, HeadLayout(6, 2, 10, 0.7), [5, 9], 2)
    assert len(ours._layouts) == before + 1
