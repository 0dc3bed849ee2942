"""Shared libraries compiled from C source by the machine's compiler, once, and cached."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from runner.common.atomic_io import write_atomically
from runner.common.cache_dir import cache_dir
from runner.common.errors import StorageError

COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++")
_MAX_BYTES = 10_000_000


class CompileError(Exception):
    """Raised where there is no library, with the reason."""


@contextmanager
def compiled(source: str, name: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """Yield the path of the library compiled from `source`, cached under `name`.

    Where the cache cannot be written, or code in it cannot be executed, the library is in a temporary folder instead;
    a process that has loaded it does not need the file any more. `name` has to differ where the result would.

    Raises:
        CompileError: no compiler, or it failed.
    """
    with ExitStack() as stack:
        try:
            library = _find_or_compile(cache_dir(), source, name, flags)
        except (OSError, StorageError, CompileError):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-runner-"))
            try:
                library = _find_or_compile(Path(folder), source, name, flags)
            except (OSError, StorageError) as error:
                raise CompileError(f"{folder}: {error}") from None
        yield str(library)


def _find_or_compile(folder: Path, source: str, name: str, flags: Sequence[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{name}.*.so"):
        if _is_intact(path) and _loads(path):
            return path
    library = _compile(source, folder, name, flags)
    if not _loads(library):
        raise CompileError(f"{library} cannot be loaded")
    return library


def _is_intact(path: Path) -> bool:
    """Return whether a library has the SHA-256 in its name: calling into a damaged one would kill the process."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                return False
            return hashlib.sha256(file.read()).hexdigest() == path.name.split(".")[-2]
    except OSError:
        return False


def digest(parts: tuple) -> str:
    """Return a short name that differs where `parts` do."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _loads(library: Path) -> bool:
    try:
        return bool(ctypes.CDLL(str(library)))
    except OSError:
        return False


def _compile(source: str, folder: Path, name: str, flags: Sequence[str]) -> Path:
    """Compile `source` to a library in `folder`, named by its SHA-256; another process finds all of it or none."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise CompileError("no C compiler (cc, gcc, clang) on PATH")
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as build:
        output = Path(build) / "library.so"
        # Without start files and libc: a compiler without the C library's headers is enough.
        command = [compiler, "-x", "c", *flags, "-shared", "-fPIC", "-nostdlib", "-o", str(output), "-"]
        try:
            done = subprocess.run(
                command, input=source, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=False
            )
        except subprocess.TimeoutExpired:
            raise CompileError(f"{compiler} took over a minute") from None
        if done.returncode != 0:
            reason = (done.stderr.strip() or "?").splitlines()[-1]
            raise CompileError(f"{compiler} could not build {name.rpartition('-')[0]}: {reason}")
        content = output.read_bytes()
    target = folder / f"{name}.{hashlib.sha256(content).hexdigest()}.so"
    write_atomically(target, content)
    return target
