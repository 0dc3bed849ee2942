"""`runner.backends.cpu.kernels.Ops` in C, where this machine has a compiler: one pass over memory instead of one per
operation, and Python's global lock is released for a whole call."""

from __future__ import annotations

import ctypes
import math
import platform
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from threading import Barrier

import numpy as np

from runner.backends.c_library import CompileError, compiled, digest
from runner.backends.cpu.array_address import address
from runner.backends.cpu.attention import HeadLayout
from runner.backends.cpu.gemm import sgemm_address
from runner.backends.cpu.kernels import Ops
from runner.backends.cpu.partitions import PackedRows, Partition
from runner.backends.cpu.workspace import Workspace

SOURCE = Path(__file__).with_name("native.c")
# Contracted products, or sums in another order, would change the last digits on another machine or compiler.
FLAGS = ("-std=gnu11", "-O3", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_MACHINE_FLAGS = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
_INT, _FLOAT, _POINTER = ctypes.c_long, ctypes.c_float, ctypes.c_void_p
_FUNCTIONS = {
    "rms_norm": (_INT, _INT, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER),
    "rms_norm_backward": (_INT, _INT, *[_POINTER] * 5),
    "swiglu": (_INT, _INT, _POINTER, _POINTER),
    "swiglu_backward": (_INT, _INT, _POINTER, _POINTER, _POINTER),
    "rope": (*[_INT] * 5, *[_POINTER] * 4, _FLOAT),
    "exp_minus_max": (_INT, _INT, _POINTER, _POINTER, _POINTER),
    "row_dots": (_INT, _INT, _POINTER, _POINTER, _POINTER),
    "attention": (_POINTER, _INT, *[_POINTER] * 6),
    "attention_backward": (_POINTER, _INT, *[_POINTER] * 10),
}


class _Layout(ctypes.Structure):
    """``layout_t`` of the source."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("heads", "kv_heads", "width", "tile")),
        ("scale", ctypes.c_float),
        ("gemm", ctypes.c_void_p),
    )


class NativeOps(Ops):
    """Kernels of a compiled library; arrays are float32 and contiguous, except where stated."""

    name = "native"

    def __init__(self, library: ctypes.CDLL, build: str = "") -> None:
        self.build = build
        for name, types in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
        self._library = library
        self._layouts: dict[tuple, _Layout] = {}

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, scale: np.ndarray) -> None:
        self._library.rms_norm(*x.shape, _pointer(x), _pointer(weight), eps, _pointer(out), _pointer(scale))

    def rms_norm_backward(
        self, x: np.ndarray, weight: np.ndarray, scale: np.ndarray, grad_out: np.ndarray, grad_x: np.ndarray
    ) -> None:
        self._library.rms_norm_backward(*x.shape, *map(_pointer, (x, weight, scale, grad_out, grad_x)))

    def swiglu(self, gate_up: np.ndarray, out: np.ndarray) -> None:
        self._library.swiglu(*out.shape, _pointer(gate_up), _pointer(out))

    def swiglu_backward(self, gate_up: np.ndarray, grad_out: np.ndarray, out: np.ndarray) -> None:
        self._library.swiglu_backward(*out.shape, _pointer(gate_up), _pointer(grad_out), _pointer(out))

    def rope(
        self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, *, inverse: bool = False
    ) -> None:
        n, heads, width = x.shape
        row_stride, head_stride, stride = (bytes_ // 4 for bytes_ in x.strides)
        assert head_stride == width and stride == 1 and positions.dtype == np.int64
        pointers = address(x), _pointer(cos), _pointer(sin), address(positions)
        self._library.rope(n, heads, row_stride, width, cos.shape[1], *pointers, -1.0 if inverse else 1.0)

    def exp_minus_max(self, x: np.ndarray, maximum: np.ndarray, sums: np.ndarray) -> None:
        self._library.exp_minus_max(*x.shape, _pointer(x), _pointer(maximum), _pointer(sums))

    def row_dots(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        self._library.row_dots(out.size, a.shape[-1], _pointer(a), _pointer(b), _pointer(out))

    def attention(
        self, qkv: np.ndarray, layout: HeadLayout, partition: Partition, out: np.ndarray, log_sums: np.ndarray
    ) -> None:
        queries, _, scores, _ = self._scratch(layout, partition)
        self._call_attention(self._library.attention, layout, partition, qkv, out, log_sums, queries, scores)

    def attention_backward(
        self,
        qkv: np.ndarray,
        layout: HeadLayout,
        partition: Partition,
        deltas: np.ndarray,
        log_sums: np.ndarray,
        grad_out: np.ndarray,
        grad_qkv: np.ndarray,
    ) -> None:
        arrays = qkv, deltas, log_sums, grad_out, grad_qkv, *self._scratch(layout, partition)
        self._call_attention(self._library.attention_backward, layout, partition, *arrays)

    def _call_attention(
        self, function: Callable[..., None], layout: HeadLayout, partition: Partition, *arrays: np.ndarray
    ) -> None:
        """Call `function` for the partition's share of the rows and heads."""
        shares = partition.attention_shares(layout.kv_heads)
        work = np.array([(s.start, s.length, s.heads.start, s.heads.stop) for s in shares], np.int64)
        fields = layout.heads, layout.kv_heads, layout.width, layout.tile, layout.scale, sgemm_address()
        # One structure for all threads: its address has to stay valid while another thread comes here.
        structure = self._layouts.setdefault(fields, _Layout(*fields))
        function(ctypes.addressof(structure), len(work), address(work), *map(_pointer, arrays))

    @staticmethod
    def _scratch(layout: HeadLayout, partition: Partition) -> list[np.ndarray]:
        """Return buffers for a tile: queries and gradients by width, scores and their gradients by positions."""
        rows = layout.group_size * layout.tile
        longest = max(partition.rows.lengths)
        columns = {"queries": layout.width, "grads": layout.width, "scores": longest, "grad_scores": longest}
        return [partition.local.buffer(name, rows, count) for name, count in columns.items()]


def _pointer(x: np.ndarray) -> int:
    assert x.dtype == np.float32 and x.flags.c_contiguous
    return address(x)


@cache
def load() -> tuple[NativeOps | None, str]:
    """Return the native kernels; or None and the reason, which is empty where nothing can be done about it."""
    if sys.platform != "linux" or sgemm_address() is None:
        return None, ""
    machine_flags = [_MACHINE_FLAGS[platform.machine()]] if platform.machine() in _MACHINE_FLAGS else []
    reason = ""
    # Without the machine's own instructions the results are the same, and slower.
    for flags in [machine_flags, []] if machine_flags else [[]]:
        try:
            return _build([*FLAGS, *flags]), ""
        except (CompileError, OSError) as error:
            reason = reason or str(error)
    return None, reason


def _build(flags: Sequence[str]) -> NativeOps:
    """Compile and verify the library. Raises CompileError where it does not compute what NumPy does."""
    source = SOURCE.read_text(encoding="utf-8")
    with compiled(source, f"native-{digest((source, flags, _processor()))}", flags) as path:
        ops = NativeOps(ctypes.CDLL(path), build=Path(path).name)
        if not _is_correct(ops):
            Path(path).unlink(missing_ok=True)
            raise CompileError("the native code built by this machine's C compiler computes wrong results")
    return ops


def _processor() -> str:
    """Return what the compiler builds for, since machines may share the cache folder."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    matches = (re.search(rf"^{name}\s*:.*$", text, re.MULTILINE) for name in ("model name", "flags", "Features"))
    return "\n".join([platform.machine(), *(match[0] for match in matches if match)])


def _is_correct(ops: Ops) -> bool:
    """Return whether each kernel computes what NumPy does, on rows longer than a tile of attention."""
    return all(
        np.allclose(result, expected, rtol=1e-4, atol=1e-5)
        for result, expected in zip(_sample(ops), _sample(Ops()), strict=True)
    )


def _sample(ops: Ops) -> list[np.ndarray]:
    """Return the results of all kernels on a fixed input."""

    def sines(*shape: int, step: float) -> np.ndarray:
        return np.sin(np.arange(1, math.prod(shape) + 1) * step).astype(np.float32).reshape(shape)

    layout, lengths = HeadLayout(4, 2, 6, 0.4), [150, 3]
    n, d = sum(lengths), layout.heads * layout.width
    rows = PackedRows(lengths)
    partition = Partition(0, 1, rows, Workspace(), Workspace(), Barrier(1))
    x, weight, grad_out = sines(n, d, step=0.7), sines(d, step=0.3), sines(n, d, step=1.1)
    normed, scale, grad_x = np.empty_like(x), np.empty((n, 1), np.float32), np.zeros_like(x)
    ops.rms_norm(x, weight, 0.1, normed, scale)
    ops.rms_norm_backward(x, weight, scale, grad_out.copy(), grad_x)
    gate_up, inner, inner_again = sines(n, 2 * d, step=0.9) * 9, np.empty_like(x), np.empty_like(x)
    ops.swiglu(gate_up, inner)
    ops.swiglu_backward(gate_up, grad_out, inner_again)
    exponentials, sums = x.copy(), np.empty(n, np.float32)
    ops.exp_minus_max(exponentials, x.max(axis=1), sums)
    qkv, angles = sines(n, layout.columns, step=1.3), sines(150, 3, step=0.2)
    heads = qkv.reshape(n, -1, layout.width)[:, : layout.heads + layout.kv_heads]
    ops.rope(heads, np.cos(angles), np.sin(angles), rows.row_positions)
    out, log_sums, grad_qkv = np.empty_like(x), np.empty((n, layout.heads), np.float32), np.empty_like(qkv)
    ops.attention(qkv, layout, partition, out, log_sums)
    deltas, by_head = np.empty_like(log_sums), (n, layout.heads, layout.width)
    ops.row_dots(out.reshape(by_head), grad_out.reshape(by_head), deltas)
    ops.attention_backward(qkv, layout, partition, deltas, log_sums, grad_out, grad_qkv)
    return [
        *(normed, scale, grad_x, inner, gate_up, inner_again, exponentials, sums),
        *(qkv, out, log_sums, deltas, grad_qkv),
    ]
