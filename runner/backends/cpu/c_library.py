"""C source to a shared library, by the machine's own compiler, once. Imports nothing but the cache's place."""

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

from runner.common.cache_dir import cache_dir

COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++")
_LARGEST = 10_000_000


class CompileError(Exception):
    """There is no library, and why."""


@contextmanager
def compiled(source: str, name: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """Path of `source` compiled, kept as `name` in the cache, or where that cannot be written, or nothing there be
    run, in a passing folder.

    `name` tells all that the result depends on. What is mapped while the path holds outlives the file.

    Raises:
        CompileError: no compiler, or it failed.
    """
    with ExitStack() as stack:
        try:
            found = _in(cache_dir(), source, name, flags)
        except (OSError, CompileError):
            passing = stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-runner-"))
            try:
                found = _in(Path(passing), source, name, flags)
            except OSError as error:
                raise CompileError(f"{passing}: {error.strerror or error}") from None
        yield str(found)


def _in(folder: Path, source: str, name: str, flags: Sequence[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{name}.*.so"):
        if _is_whole(path) and _loads(path):
            return path
    made = _compile(source, folder, name, flags)
    if not _loads(made):
        raise CompileError(f"{made} cannot be loaded")
    return made


def _is_whole(path: Path) -> bool:
    """Whether a library is as it was compiled: what of a damaged one is missing would end the process that calls it.
    Its name tells its sum."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST:
                return False
            return hashlib.sha256(file.read()).hexdigest() == path.name.split(".")[-2]
    except OSError:
        return False


def digest(facts: tuple) -> str:
    """Short text that differs where `facts` do."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _loads(library: Path) -> bool:
    try:
        return bool(ctypes.CDLL(str(library)))
    except OSError:
        return False


def _compile(source: str, folder: Path, name: str, flags: Sequence[str]) -> Path:
    """Compile in `folder`, sync, rename: a second process at work sees all of it or nothing."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise CompileError("no C compiler (cc, gcc, clang) on PATH")
    handle, built = tempfile.mkstemp(prefix=name, suffix=".tmp", dir=folder)
    try:
        # Without start files and libc: a compiler without the C library's headers is enough.
        words = [compiler, "-x", "c", *flags, "-shared", "-fPIC", "-nostdlib", "-o", built, "-"]
        done = subprocess.run(
            words, input=source, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=False
        )
        if done.returncode != 0:
            said = (done.stderr.strip() or "?").splitlines()[-1]
            raise CompileError(f"{compiler} could not build {name.rpartition('-')[0]}: {said}")
        os.fchmod(handle, 0o755)  # a cache may be shared
        os.fsync(handle)
        target = folder / f"{name}.{hashlib.sha256(Path(built).read_bytes()).hexdigest()}.so"
        os.replace(built, target)
        return target
    except subprocess.TimeoutExpired:
        raise CompileError(f"{compiler} took over a minute") from None
    finally:
        os.close(handle)
        Path(built).unlink(missing_ok=True)
