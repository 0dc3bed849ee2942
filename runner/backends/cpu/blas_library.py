"""Open a BLAS for the whole process: prove that it multiplies, give it the plain names, describe it.

OpenBLAS, MKL and BLIS export ``cblas_sgemm``; such a library only has to be loaded with RTLD_GLOBAL. The
``scipy-openblas32`` wheel exports ``scipy_cblas_sgemm``, so that it never collides: a small shim of jump
instructions, compiled once with the machine's C compiler, gives it the plain names. Jumps leave registers and
stack as they are, which makes them right for every signature, hidden Fortran arguments included.
"""

from __future__ import annotations

import ctypes
import operator
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from runner.backends.cpu.c_library import CompileError, compiled, digest
from runner.common.cache_dir import cache_dir

PREFIX = "scipy_"
# What libmlx.so of mlx-cpu 0.32 leaves undefined, and zgemm, so that no complex product is split between two.
FORWARDED = (
    *(f"cblas_{kind}gemm" for kind in "sdcz"),
    *(f"{kind}{name}_" for kind in "sdc" for name in ("geev", "gesdd")),
    *(f"{kind}{name}_" for kind in "sd" for name in ("geqrf", "getrf", "getri", "orgqr", "potrf", "syevd", "trtri")),
    "cheevd_",
)
# A landing pad (for CPUs that check indirect branches), then the jump.
JUMPS = {"x86_64": "endbr64\\n jmp {}@PLT", "aarch64": "hint #34\\n b {}"}


class BlasError(Exception):
    """This library cannot be used, and why; the next candidate is tried."""


@dataclass(frozen=True)
class LoadedBlas:
    """A library that now answers ``cblas_sgemm`` for the whole process."""

    version: str
    core: str | None
    threads: int | None


def open_for_process(path: str) -> LoadedBlas:
    """Load `path` so that every library loaded later finds its BLAS names here.

    It is proved in a child process first, once per file, because a BLAS that does not fit the machine ends
    the process (illegal instruction, MKL without its threading layer) rather than report an error.

    Raises BlasError where the file is missing, not a BLAS, computes wrong results or comes second to another.
    """
    mark = _proof_mark(path)
    if not (mark and mark.exists()):
        _try_in_child(path)
        if mark:
            _touch(mark)
    return open_here(path)


def open_here(path: str, size: int = 12) -> LoadedBlas:
    """`open_for_process` without the child: proved in this process, on `size` x `size` matrices."""
    library = _open(path)
    prefix = "" if hasattr(library, "cblas_sgemm") else PREFIX
    if not hasattr(library, f"{prefix}cblas_sgemm"):
        raise BlasError(f"{path} has no cblas_sgemm")
    loaded = describe(library, prefix)
    if "USE64BITINT" in loaded.version:
        raise BlasError(f"{path} takes 64-bit integers, MLX passes 32-bit ones")
    with ExitStack() as stack:
        if prefix:
            _open(path, ctypes.RTLD_GLOBAL)
            names = tuple(name for name in FORWARDED if hasattr(library, PREFIX + name))
            path = stack.enter_context(_shim(_shim_source(names), loaded.version))
            library = _open(path)
        _prove(library.cblas_sgemm, path, size)
        # Only what has proved right becomes global: until here no other library can meet it.
        _open(path, ctypes.RTLD_GLOBAL)
    # MKL's entry library loads its parts globally itself: one of those may come first.
    if os.path.dirname(owner("cblas_sgemm") or "") != os.path.dirname(path):
        raise BlasError("another library's cblas_sgemm comes first in this process")
    return loaded


class _DlInfo(ctypes.Structure):
    """``Dl_info`` of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def owner(name: str) -> str | None:
    """Path of the library in which the global scope finds `name` now, or None where nothing has it."""
    everything, found = ctypes.CDLL(None), _DlInfo()
    if not hasattr(everything, name):
        return None
    everything.dladdr(ctypes.cast(getattr(everything, name), ctypes.c_void_p), ctypes.byref(found))
    return os.fsdecode(found.file or b"")


def describe(library: ctypes.CDLL, prefix: str = "") -> LoadedBlas:
    """Version, kernel type and thread count as OpenBLAS, MKL or BLIS itself tells them."""
    if version := _text(library, f"{prefix}openblas_get_config"):
        core = _text(library, f"{prefix}openblas_get_corename")
        return LoadedBlas(version, core, _number(library, f"{prefix}openblas_get_num_threads"))
    if hasattr(library, "MKL_Get_Version_String"):
        buffer = ctypes.create_string_buffer(198)
        library.MKL_Get_Version_String(buffer, len(buffer))
        version = buffer.value.decode(errors="replace").strip()
        return LoadedBlas(version, None, _number(library, "MKL_Get_Max_Threads"))
    if version := _text(library, "bli_info_get_version_str"):
        return LoadedBlas(f"BLIS {version}", None, _number(library, "bli_thread_get_num_threads"))
    return LoadedBlas("BLAS of unknown make", None, None)


def _text(library: ctypes.CDLL, name: str) -> str | None:
    function = getattr(library, name, None)
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    return (function() or b"").decode(errors="replace").strip() or None


def _number(library: ctypes.CDLL, name: str) -> int | None:
    function = getattr(library, name, None)
    return None if function is None else int(function())


def _open(path: str, mode: int = 0) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path, mode=mode)
    except OSError as error:
        raise BlasError(str(error)) from None


def _prove(sgemm: Callable[..., object], whose: str, size: int) -> None:
    """Check C = A B and C = A B^T of whole numbers, exact in float32, by C v = A (B v) (Freivalds 1977)."""
    count = size * size
    a = [(i * 7 + 3) % 11 - 5 for i in range(count)]
    b = [(i * 5 + 1) % 13 - 6 for i in range(count)]
    v = [i % 3 - 1 for i in range(size)]
    array = ctypes.c_float * count
    row_major, plain, transposed = 101, 111, 112
    alpha, beta = ctypes.c_float(1.0), ctypes.c_float(0.0)
    for flag in (plain, transposed):
        right, product = array(*b), array(*[99.0] * count)
        sgemm(row_major, plain, flag, size, size, size, alpha, array(*a), size, right, size, beta, product, size)
        columns: list[Sequence[float]] = [b[j::size] for j in range(size)]
        rows = columns if flag == transposed else _rows(b, size)
        if _times(_rows(list(product), size), v) != _times(_rows(a, size), _times(rows, v)):
            raise BlasError(f"{whose} computes a wrong product")


def _rows(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[i : i + size] for i in range(0, size * size, size)]


def _times(rows: list[Sequence[float]], vector: Sequence[float]) -> list[float]:
    return [sum(map(operator.mul, row, vector)) for row in rows]


def _try_in_child(path: str) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import runner.backends.cpu.blas_library as b; b.try_out(sys.argv[2])"
    root = str(Path(__file__).resolve().parents[3])
    try:
        child = subprocess.run(
            [sys.executable, "-c", code, root, path], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BlasError(f"{path} could not be tried: {error}") from None
    if child.returncode != 0:
        said = (child.stderr.strip() or child.stdout.strip() or f"ended with {child.returncode}").splitlines()
        raise BlasError(f"{path}: {said[-1]}" if path not in said[-1] else said[-1])


def try_out(path: str) -> None:
    """What the child process does: open `path` and end with the reason where that fails."""
    try:
        open_here(path, size=64)
    except BlasError as error:
        raise SystemExit(str(error)) from None


def _proof_mark(path: str) -> Path | None:
    """The empty cache file that says that this very file was proved on this machine; None for a bare name."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    facts = (os.path.realpath(path), found.st_size, found.st_mtime_ns, _machine())
    return cache_dir() / f"blas-proved-{digest(facts)}"


def _touch(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return


def _shim_source(names: tuple[str, ...]) -> str:
    jump = JUMPS.get(platform.machine())
    if jump is None:
        raise BlasError(f"no shim for {platform.machine()}")
    parts = (
        f'__asm__(".text\\n .globl {name}\\n .type {name}, %function\\n{name}:\\n '
        f'{jump.format(PREFIX + name)}\\n .size {name}, .-{name}\\n");'
        for name in names
    )
    return "\n".join(parts) + "\n"


@contextmanager
def _shim(source: str, version: str) -> Iterator[str]:
    """Path of the compiled shim."""
    try:
        with compiled(source, f"blas-shim-{digest((source, version, _machine()))}") as path:
            yield path
    except CompileError as error:
        raise BlasError(str(error)) from None


def _machine() -> str:
    return f"{platform.machine()} {platform.libc_ver()}"
