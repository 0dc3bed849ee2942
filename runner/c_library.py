"""C source to a shared library, by the machine's own compiler, once. Imports nothing but the cache's place."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from runner.cache import cache_folder

COMPILERS = ("cc", "gcc", "clang", "c++", "g++", "clang++")


class CompileError(Exception):
    """There is no library, and why."""


@contextmanager
def compiled(source: str, name: str, flags: Sequence[str] = ()) -> Iterator[str]:
    """Path of `source` compiled, kept as `name` in the cache, or in a passing folder where that cannot be written.

    `name` tells all that the result depends on. What is mapped while the path holds outlives the file.

    Raises:
        CompileError: no compiler, or it failed.
    """
    folder = cache_folder()
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = _kept(folder, name) or _compile(source, folder, name, flags)
        except OSError:
            found = _compile(source, Path(stack.enter_context(_passing_folder())), name, flags)
        yield str(found)


def _passing_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mlx-runner-")


def _kept(folder: Path, name: str) -> Path | None:
    """The library that was compiled earlier, whole: of a damaged one, parts would only be missed when they are
    called. Its name tells its sum."""
    for path in folder.glob(f"{name}.*.so"):
        if hashlib.sha256(path.read_bytes()).hexdigest() == path.name.split(".")[-2] and _loads(path):
            return path
        path.unlink(missing_ok=True)
    return None


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
        done = subprocess.run(words, input=source, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode != 0:
            said = (done.stderr.strip() or "?").splitlines()[-1]
            raise CompileError(f"{compiler} could not build {name.rpartition('-')[0]}: {said}")
        os.fsync(handle)
        target = folder / f"{name}.{hashlib.sha256(Path(built).read_bytes()).hexdigest()}.so"
        os.replace(built, target)
        return target
    except subprocess.TimeoutExpired:
        raise CompileError(f"{compiler} took over a minute") from None
    finally:
        os.close(handle)
        Path(built).unlink(missing_ok=True)
