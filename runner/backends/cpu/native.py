"""The same as `runner.backends.cpu.ops.Ops` by code in C, where this machine has a compiler: one pass over the numbers instead
of one for each operation, and the interpreter's lock is let go of for a whole piece of work."""

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

from runner.backends.cpu.attention import HeadLayout
from runner.backends.cpu.c_library import CompileError, compiled, digest
from runner.backends.cpu.gemm import address, entry
from runner.backends.cpu.ops import Ops
from runner.backends.cpu.partitions import PackedRows, Partition
from runner.backends.cpu.workspace import Workspace

SOURCE = Path(__file__).with_name("native.c")
# Contracted products, or sums in another order, would give other bits on another machine or compiler.
FLAGS = ("-std=gnu11", "-O3", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_FOR_THIS_MACHINE = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
_INT, _FLOAT, _POINTER = ctypes.c_long, ctypes.c_float, ctypes.c_void_p
_FUNCTIONS = {
    "rms_norm": (_INT, _INT, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER),
    "rms_norm_back": (_INT, _INT, *[_POINTER] * 5),
    "swiglu": (_INT, _INT, _POINTER, _POINTER),
    "swiglu_back": (_INT, _INT, _POINTER, _POINTER, _POINTER),
    "rotate": (*[_INT] * 5, *[_POINTER] * 4, _FLOAT),
    "exponentials": (_INT, _INT, _POINTER, _POINTER, _POINTER),
    "dots": (_INT, _INT, _POINTER, _POINTER, _POINTER),
    "attend": (_POINTER, _INT, *[_POINTER] * 6),
    "attend_back": (_POINTER, _INT, *[_POINTER] * 10),
}


class _Shape(ctypes.Structure):
    """``shape_t`` of the source."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("heads", "kv_heads", "width", "tile")),
        ("scale", ctypes.c_float),
        ("gemm", ctypes.c_void_p),
    )


class NativeOps(Ops):
    """Arrays are float32, and contiguous where nothing else is said."""

    name = "native"

    def __init__(self, library: ctypes.CDLL, build: str = "") -> None:
        self.build = build
        for name, types in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
        self._library = library
        self._shapes: dict[tuple, _Shape] = {}

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray, scale: np.ndarray) -> None:
        self._library.rms_norm(*x.shape, _at(x), _at(weight), eps, _at(out), _at(scale))

    def rms_norm_back(
        self, x: np.ndarray, weight: np.ndarray, scale: np.ndarray, by_out: np.ndarray, add_to: np.ndarray
    ) -> None:
        self._library.rms_norm_back(*x.shape, _at(x), _at(weight), _at(scale), _at(by_out), _at(add_to))

    def swiglu(self, gate_up: np.ndarray, out: np.ndarray) -> None:
        self._library.swiglu(*out.shape, _at(gate_up), _at(out))

    def swiglu_back(self, gate_up: np.ndarray, by_out: np.ndarray, out: np.ndarray) -> None:
        self._library.swiglu_back(*out.shape, _at(gate_up), _at(by_out), _at(out))

    def rotate(
        self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray, places: np.ndarray, *, back: bool = False
    ) -> None:
        n, heads, width = x.shape
        step, between, one = (stride // 4 for stride in x.strides)
        assert between == width and one == 1 and places.dtype == np.int64
        where = address(x), _at(cos), _at(sin), address(places)
        self._library.rotate(n, heads, step, width, cos.shape[1], *where, -1.0 if back else 1.0)

    def exponentials(self, x: np.ndarray, top: np.ndarray, sums: np.ndarray) -> None:
        self._library.exponentials(*x.shape, _at(x), _at(top), _at(sums))

    def dots(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        self._library.dots(out.size, a.shape[-1], _at(a), _at(b), _at(out))

    def attend(
        self, qkv: np.ndarray, shape: HeadLayout, lane: Partition, out: np.ndarray, log_sums: np.ndarray
    ) -> None:
        rooms = self._rooms(shape, lane)
        self._attention(self._library.attend, shape, lane, qkv, out, log_sums, rooms[0], rooms[2])

    def attend_back(
        self,
        qkv: np.ndarray,
        shape: HeadLayout,
        lane: Partition,
        deltas: np.ndarray,
        log_sums: np.ndarray,
        by_out: np.ndarray,
        by_qkv: np.ndarray,
    ) -> None:
        rooms = self._rooms(shape, lane)
        self._attention(self._library.attend_back, shape, lane, qkv, deltas, log_sums, by_out, by_qkv, *rooms)

    def _attention(
        self, function: Callable[..., None], shape: HeadLayout, lane: Partition, *arrays: np.ndarray
    ) -> None:
        """`function` on this lane's share of the rows and the heads of keys."""
        share = lane.share(shape.kv_heads)
        work = np.array([(start, length, heads.start, heads.stop) for start, length, heads in share], np.int64)
        sizes = shape.heads, shape.kv_heads, shape.width, shape.tile, shape.scale, entry()
        held = self._shapes.setdefault(sizes, _Shape(*sizes))  # its address must hold while another lane comes here
        function(ctypes.addressof(held), len(work), address(work), *map(_at, arrays))

    @staticmethod
    def _rooms(shape: HeadLayout, lane: Partition) -> list[np.ndarray]:
        """For queries and what is given, a tile of them; for weights and slopes, each by all positions of a row."""
        lines = shape.group * shape.tile
        columns = {"queries": shape.width, "given": shape.width, "scores": 0, "slopes": 0}
        longest = max(lane.rows.lengths)
        return [lane.own.get(name, lines, count or longest) for name, count in columns.items()]


def _at(x: np.ndarray) -> int:
    assert x.dtype == np.float32 and x.flags.c_contiguous
    return address(x)


@cache
def load() -> tuple[NativeOps | None, str]:
    """What C code of ours computes here; or None, and why, where something can be done about it."""
    if sys.platform != "linux" or entry() is None:
        return None, ""
    machine = platform.machine()
    own = [_FOR_THIS_MACHINE[machine]] if machine in _FOR_THIS_MACHINE else []
    why = ""
    for more in [own, []] if own else [own]:  # the bits are the same, the plain ones slower
        try:
            return _built([*FLAGS, *more]), ""
        except (CompileError, OSError) as error:
            why = why or str(error)
    return None, why


def _built(flags: Sequence[str]) -> NativeOps:
    """Raises CompileError where what the compiler made does not compute what NumPy does."""
    source = SOURCE.read_text(encoding="utf-8")
    with compiled(source, f"native-{digest((source, flags, _processor()))}", flags) as path:
        ops = NativeOps(ctypes.CDLL(path), build=Path(path).name)
        if not _proven(ops):
            Path(path).unlink(missing_ok=True)
            raise CompileError("what this machine's C compiler makes of it does not compute the right numbers")
    return ops


def _processor() -> str:
    """What the compiler makes code for, where the cache folder is shared by machines."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = (re.search(rf"^{name}\s*:.*$", text, re.MULTILINE) for name in ("model name", "flags", "Features"))
    return "\n".join([platform.machine(), *(one[0] for one in found if one)])


def _proven(ops: Ops) -> bool:
    """Whether each function computes what NumPy does, with rows that take more than one tile of attention."""
    return all(
        np.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(_sample(ops), _sample(Ops()), strict=True)
    )


def _sample(ops: Ops) -> list[np.ndarray]:
    """What each function makes of a few numbers."""

    def some(*shape: int, by: float) -> np.ndarray:
        return np.sin(np.arange(1, math.prod(shape) + 1) * by).astype(np.float32).reshape(shape)

    shape, lengths = HeadLayout(4, 2, 6, 0.4), [150, 3]
    n, d = sum(lengths), shape.heads * shape.width
    rows = PackedRows(lengths)
    lane = Partition(0, 1, rows, Workspace(), Workspace(), Barrier(1), ops)
    x, weight, by_out = some(n, d, by=0.7), some(d, by=0.3), some(n, d, by=1.1)
    normed, scale, total = np.empty_like(x), np.empty((n, 1), np.float32), np.zeros_like(x)
    ops.rms_norm(x, weight, 0.1, normed, scale)
    ops.rms_norm_back(x, weight, scale, by_out.copy(), total)
    gate_up, inner, again = some(n, 2 * d, by=0.9) * 9, np.empty_like(x), np.empty_like(x)
    ops.swiglu(gate_up, inner)
    ops.swiglu_back(gate_up, by_out, again)
    exponentials, sums = x.copy(), np.empty(n, np.float32)
    ops.exponentials(exponentials, x.max(axis=1), sums)
    qkv, angles = some(n, shape.columns, by=1.3), some(150, 3, by=0.2)
    heads = qkv.reshape(n, -1, shape.width)[:, : shape.heads + shape.kv_heads]
    ops.rotate(heads, np.cos(angles), np.sin(angles), rows.places)
    out, log_sums, by_qkv = np.empty_like(x), np.empty((n, shape.heads), np.float32), np.empty_like(qkv)
    ops.attend(qkv, shape, lane, out, log_sums)
    deltas, split = np.empty_like(log_sums), (n, shape.heads, shape.width)
    ops.dots(out.reshape(split), by_out.reshape(split), deltas)
    ops.attend_back(qkv, shape, lane, deltas, log_sums, by_out, by_qkv)
    return [normed, scale, total, inner, gate_up, again, exponentials, sums, qkv, out, log_sums, deltas, by_qkv]
