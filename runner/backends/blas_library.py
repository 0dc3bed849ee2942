"""Open a BLAS for the whole process: verify its results, export its functions under the plain names, describe it.

OpenBLAS, MKL and BLIS export ``cblas_sgemm``; such a library only has to be loaded with RTLD_GLOBAL. The
``scipy-openblas32`` wheel exports ``scipy_cblas_sgemm``, so that it never collides: a small shim of jump
instructions, compiled once with the machine's C compiler, adds the plain names. Jumps leave registers and stack
unchanged, so they are right for every signature, hidden Fortran arguments included.
"""

from __future__ import annotations

import ctypes
import operator
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from runner.backends.c_library import CompileError, compiled, digest
from runner.common.cache_dir import cache_dir

PREFIX = "scipy_"
# The undefined symbols of libmlx.so in mlx-cpu 0.32; and zgemm, so that complex products come from one library.
FORWARDED = (
    *(f"cblas_{kind}gemm" for kind in "sdcz"),
    *(f"{kind}{name}_" for kind in "sdc" for name in ("geev", "gesdd")),
    *(f"{kind}{name}_" for kind in "sd" for name in ("geqrf", "getrf", "getri", "orgqr", "potrf", "syevd", "trtri")),
    "cheevd_",
)
# A landing pad, for CPUs that check indirect branches, then the jump.
JUMPS = {"x86_64": "endbr64\\n jmp {}@PLT", "aarch64": "hint #34\\n b {}"}


class BlasError(Exception):
    """Raised where a library cannot be used, with the reason; the next candidate is tried."""


@dataclass(frozen=True)
class LoadedBlas:
    """The library that provides ``cblas_sgemm`` for the whole process."""

    version: str
    core: str | None
    threads: int | None


def open_for_process(path: str) -> LoadedBlas:
    """Load `path` so that every library loaded later resolves its BLAS symbols to it.

    It is verified in a child process first, once per file: a BLAS that does not fit the machine kills the process
    (illegal instruction, MKL without its threading layer) instead of reporting an error.

    Raises:
        BlasError: the file is missing, not a BLAS, computes wrong results, or another library's symbols come first.
    """
    marker = _verified_marker(path)
    if not (marker and marker.exists()):
        _verify_in_child(path)
        if marker:
            with suppress(OSError):
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
    return open_here(path)


def open_here(path: str, size: int = 12) -> LoadedBlas:
    """Load `path` as `open_for_process` does, without the child process; verified on `size` x `size` matrices."""
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
            path = stack.enter_context(_compiled_shim(names, loaded.version))
            library = _open(path)
        _verify(library.cblas_sgemm, path, size)
        # Only a verified library becomes global: until here no other library resolves symbols to it.
        _open(path, ctypes.RTLD_GLOBAL)
    # MKL's entry library loads its parts globally itself, and one of those may come first.
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
    """Return the path of the library that the global scope resolves `name` to, or None."""
    process, info = ctypes.CDLL(None), _DlInfo()
    if not hasattr(process, name):
        return None
    process.dladdr(ctypes.cast(getattr(process, name), ctypes.c_void_p), ctypes.byref(info))
    return os.fsdecode(info.file or b"")


def describe(library: ctypes.CDLL, prefix: str = "") -> LoadedBlas:
    """Return version, kernel type and thread count as OpenBLAS, MKL or BLIS report them."""
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
    return LoadedBlas("unknown BLAS", None, None)


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


def _verify(sgemm: Callable[..., object], path: str, size: int) -> None:
    """Check C = A B and C = A B^T of integers, exact in float32, by C v = A (B v) (Freivalds, 1977)."""
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
            raise BlasError(f"{path} computes a wrong product")


def _rows(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[i : i + size] for i in range(0, size * size, size)]


def _times(rows: list[Sequence[float]], vector: Sequence[float]) -> list[float]:
    return [sum(map(operator.mul, row, vector)) for row in rows]


def _verify_in_child(path: str) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from runner.backends import blas_library; blas_library.verify_and_exit(sys.argv[2])"
    )
    root = str(Path(__file__).resolve().parents[2])
    try:
        child = subprocess.run(
            [sys.executable, "-c", code, root, path], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BlasError(f"{path} could not be verified: {error}") from None
    if child.returncode != 0:
        output = child.stderr.strip() or child.stdout.strip() or f"exited with {child.returncode}"
        reason = output.splitlines()[-1]
        raise BlasError(reason if path in reason else f"{path}: {reason}")


def verify_and_exit(path: str) -> None:
    """Open `path`; exit with the reason where that fails. Runs in the child process."""
    try:
        open_here(path, size=64)
    except BlasError as error:
        raise SystemExit(str(error)) from None


def _verified_marker(path: str) -> Path | None:
    """Return the empty cache file that records that this file was verified on this machine; None for a bare name."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    identity = (os.path.realpath(path), status.st_size, status.st_mtime_ns, _machine())
    return cache_dir() / f"blas-proved-{digest(identity)}"


@contextmanager
def _compiled_shim(names: tuple[str, ...], version: str) -> Iterator[str]:
    """Yield the path of a library whose functions `names` jump to those of the wheel."""
    jump = JUMPS.get(platform.machine())
    if jump is None:
        raise BlasError(f"no shim for {platform.machine()}")
    parts = (
        f'__asm__(".text\\n .globl {name}\\n .type {name}, %function\\n{name}:\\n '
        f'{jump.format(PREFIX + name)}\\n .size {name}, .-{name}\\n");\n'
        for name in names
    )
    source = "".join(parts)
    try:
        with compiled(source, f"blas-shim-{digest((source, version, _machine()))}") as path:
            yield path
    except CompileError as error:
        raise BlasError(str(error)) from None


def _machine() -> str:
    return f"{platform.machine()} {platform.libc_ver()}"
