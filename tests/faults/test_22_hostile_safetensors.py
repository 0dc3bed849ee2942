"""Hostile safetensors files through every command that reads one: each is refused within a second and 200 MB."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.checkpoints import manifest
from runner.checkpoints.safetensors_file import unpack
from runner.common import sealed_json

pytestmark = [pytest.mark.fault(22), pytest.mark.slow]


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def file(path: Path, header: Any, data: bytes = b"", *, claims: int | None = None, size: int | None = None) -> None:
    """Write a file with `header`, whose stated length may be `claims`, extended to `size` bytes by a hole."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as out:
        out.write((len(text) if claims is None else claims).to_bytes(8, "little") + text + data)
        if size is not None:
            out.truncate(size)


def _many(count: int) -> bytes:
    one = b'"a%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    return b"{" + b",".join([one % (i, i, i + 1) for i in range(count)]) + b"}"


SOUND = "as many tensors as fit a header"
"""A well-formed file: only a check against the model can refuse it."""
HOSTILE: dict[str, Callable[[Path], None]] = {
    "a header of 99,999,999 bytes": lambda path: file(path, b"{", claims=99_999_999, size=100_000_007),
    "a header of 8 exabytes": lambda path: file(path, b"{}", claims=(1 << 63) - 1),
    "a header of 2 GB in a sparse file": lambda path: file(path, b"{", claims=(2 << 30) - 8, size=2 << 30),
    "two tensors at the same offsets": lambda path: file(path, {"a": entry(0, 4), "b": entry(0, 4)}, b"1234"),
    "an overlap": lambda path: file(path, {"a": entry(0, 3), "b": entry(2, 4)}, b"1234"),
    "a hole": lambda path: file(path, {"a": entry(0, 1), "b": entry(3, 4)}, b"1234"),
    "a hole of 2 GB at the end": lambda path: file(path, {"a": entry(0, 1)}, b"1", size=2 << 30),
    "a name twice": lambda path: file(path, b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 1)).encode(),) * 2), b"1"),
    "a shape that overflows": lambda path: file(path, {"a": entry(0, 0, [2**61, 8])}),
    "a shape that wraps to one byte": lambda path: file(path, {"a": entry(0, 1, [2**31 + 1] * 64)}, b"1"),
    "an axis of 2^40 and one of 0": lambda path: file(path, {"a": entry(0, 0, [2**40, 0])}),
    "nine million brackets": lambda path: file(path, b'{"a":' + b"[" * 9_000_000),
    "objects 400,000 deep": lambda path: file(path, b'{"a":' * 400_000),
    "negative offsets": lambda path: file(path, {"a": entry(-4, 0, [4])}, b"1234"),
    "NaN for an offset": lambda path: file(path, b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,NaN]}}', b"1"),
    "not UTF-8": lambda path: file(path, b'{"\xff\xfe":%b}' % json.dumps(entry(0, 1)).encode(), b"1"),
    "a million tensors": lambda path: file(path, _many(1_000_000), bytes(1_000_000)),
    SOUND: lambda path: file(path, _many(83_000), bytes(83_000)),
    "a number of nine million digits": lambda path: file(path, b'{"a":' + b"7" * 9_000_000 + b"}"),
    "a name of nine million letters": lambda path: file(path, {"a" * 9_000_000: entry(0, 1)}, b"1"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Canary(path.with_name("ran")))),
    "arbitrary bytes": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "an empty file": lambda path: path.write_bytes(b""),
}


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], Path]:
    """`made(name)`: the hostile file of that name; those of gigabytes are sparse."""
    folder = tmp_path_factory.mktemp("hostile")

    def make(name: str) -> Path:
        path = folder / f"{list(HOSTILE).index(name):02d}.safetensors"
        if not path.exists():
            HOSTILE[name](path)
        return path

    return make


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_cli) -> Path:
    """A finished run of the tiny model."""
    cli = make_cli(tmp_path_factory.mktemp("run"))
    cli("model=tiny", "data=tiny", "train.iters=4", "checkpoint.every=2", "hydra.run.dir=run")
    return cli.folder / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny model as a model folder."""
    from runner.config.schema import ModelConfig
    from runner.export.mlx import write_model_folder
    from runner.models.load import load_base_model

    path = tmp_path_factory.mktemp("model") / "tiny"
    write_model_folder(load_base_model(ModelConfig(path="builtin:tiny")), path)
    return path


def put(source: Path, target: Path) -> None:
    """Link `source` at `target`, without copying its bytes."""
    target.unlink(missing_ok=True)
    target.hardlink_to(source)


def resealed(folder: Path, name: str, source: Path) -> None:
    """Put `source` as `name` into the folder and write a matching manifest, as an attacker would."""
    put(source, folder / name)
    sealed = folder / manifest.NAME
    if not sealed.exists():
        return
    record = {key: value for key, value in json.loads(sealed.read_bytes()).items() if key != "sha256"}
    with source.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    record["files"][name] = {"size": source.stat().st_size, "sha256": digest}
    sealed.write_bytes(sealed_json.seal(record))


def of_run(at: str, name: str) -> Callable[[Path, Path, Path, Path], Path]:
    """A command that is given a run with the hostile file in it."""

    def prepare(place: Path, source: Path, run: Path, folder: Path) -> Path:
        shutil.copytree(run, place / "run")
        for other in (place / "run/checkpoints/step-0000002", place / "run/checkpoints/step-0000004"):
            if other.name != Path(at).name:
                shutil.rmtree(other)
        resealed(place / "run" / at, name, source)
        return place / "run"

    return prepare


def _file(place: Path, source: Path, run: Path, folder: Path) -> Path:
    put(source, place / "a.safetensors")
    return place / "a.safetensors"


def _adapter_folder(place: Path, source: Path, run: Path, folder: Path) -> Path:
    shutil.copytree(run / "adapters", place / "adapters")
    put(source, place / "adapters/adapters.safetensors")
    return place / "adapters"


def _model_folder(place: Path, source: Path, run: Path, folder: Path) -> Path:
    shutil.copytree(folder, place / "model")
    put(source, place / "model/model.safetensors")
    return place / "model"


STEP = "checkpoints/step-0000004"
TINY = ("model=tiny", "data=tiny", "train.iters=1", "hydra.run.dir=new")
ENTRY_POINTS: dict[str, tuple[str, Callable[..., Path], Callable[[str], tuple[str, ...]]]] = {
    "adapter=FILE": ("adapter", _file, lambda path: (f"adapter={path}", *TINY)),
    "adapter=FOLDER": ("adapter", _adapter_folder, lambda path: (f"adapter={path}", *TINY)),
    "resume= its adapter": ("resume", of_run(STEP, "adapters.safetensors"), lambda path: (f"resume={path}",)),
    "resume= its optimizer": ("resume", of_run(STEP, "optimizer.safetensors"), lambda path: (f"resume={path}",)),
    "generate": ("generate", of_run("adapters", "adapters.safetensors"), lambda path: ("generate", path, "hi")),
    "export": ("export", of_run("adapters", "adapters.safetensors"), lambda path: ("export", path, "--to", "mlx")),
    "verify": ("audit", of_run(STEP, "adapters.safetensors"), lambda path: ("verify", path)),
    "model.path=FOLDER": (
        "model",
        _model_folder,
        lambda path: (f"model.path={path}", "data=tiny", "train.iters=1", "hydra.run.dir=new"),
    ),
}
"""For each command: the reader of measure.py behind it, how the file gets there, and what is typed."""


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_every_hostile_file_is_refused_within_a_second_and_200_mb(
    cases, cli, tmp_path_factory, made, run, folder, hostile, entry_point
):
    reader, prepare, _ = ENTRY_POINTS[entry_point]
    places = tmp_path_factory.mktemp("places")
    paths = {}
    for name in cases.some([name for name in HOSTILE if not (name == SOUND and reader in ("export", "audit"))], 6):
        place = places / made(name).stem
        place.mkdir()
        paths[name] = prepare(place, made(name), run, folder)
    for name, found in zip(paths, hostile.measure(cli, reader, list(paths.values())), strict=True):
        assert found["error"] in ("CheckpointError", "ModelError"), (name, found)
        assert found["message"].isprintable() or "\n" in found["message"], (name, found)
        assert len(found["message"]) < 1000, (name, found)
        assert found["seconds"] < hostile.SECONDS, (name, found)
        assert found["bytes"] < hostile.BYTES, (name, found)
        cases.done()
    assert not [mark for place in {places, *(made(name).parent for name in paths)} for mark in place.rglob("ran")]


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_the_command_reports_the_file_and_exits_with_2_or_5(cases, cli, made, run, folder, entry_point):
    _, prepare, arguments = ENTRY_POINTS[entry_point]
    mine = list(ENTRY_POINTS).index(entry_point)
    names = [name for name in HOSTILE if not (name == SOUND and entry_point in ("export", "verify"))]
    for name in cases.some(names[mine:] + names[:mine], 1):
        place = cli.folder / made(name).stem
        place.mkdir()
        path = prepare(place, made(name), run, folder)
        process = cli.start(*arguments(str(path)))
        out, _ = process.communicate(timeout=120)
        assert process.returncode in (2, 5), (name, out)
        assert "Traceback" not in out and path.name in out, (name, out)
        shutil.rmtree(cli.folder / "new", ignore_errors=True)
        cases.done()


def _pickle_inside(path: Path, names: list[str]) -> None:
    np.savez(path, **{names[0]: np.array([Canary(path.with_name("ran"))], dtype=object)})


def _bomb(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in names:
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array_header_1_0(
                    member, {"descr": "<f4", "fortran_order": False, "shape": (1 << 21,)}
                )
                for _ in range(8):
                    member.write(bytes(1 << 20))


def _absolute_names(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in (str(path.with_name("ran")), "../ran", "/etc/ran.npy", "..\\ran"):
            archive.writestr(name, b"\x93NUMPY")


def _entries(path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(300):
            archive.writestr(f"{number}{'x' * 20_000}.npy", b"")


def _claims(shape: str) -> Callable[[Path, list[str]], None]:
    def make(path: Path, names: list[str]) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(118) + b"\n"
                archive.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text)

    return make


ARCHIVES = {
    "a pickle inside": _pickle_inside,
    "a bomb": _bomb,
    "absolute names": _absolute_names,
    "a directory of 6 MB": _entries,
    "a shape of 2^60": _claims("(1152921504606846976,)"),
    "a shape that is a call": _claims("(__import__('os').system('true'),)"),
    "a shape nested deeply": _claims("(" * 4000 + ")" * 4000),
    "cut off": lambda path, names: path.write_bytes(b"PK\5\6" + b"\xff" * 18),
    "a pickle": lambda path, names: path.write_bytes(pickle.dumps(Canary(path.with_name("ran")))),
}


def test_a_hostile_npz_for_a_warm_start_is_refused_at_once_and_nothing_is_executed_or_unpacked(
    cases, cli, run, tmp_path, hostile
):
    names = list(unpack((run / "adapters/adapters.safetensors").read_bytes(), where="here")[0])
    paths = []
    for number, make in enumerate(ARCHIVES.values()):
        paths.append(tmp_path / f"{number}.npz")
        make(paths[-1], names)
    for name, found in zip(ARCHIVES, hostile.measure(cli, "adapter", paths), strict=True):
        assert found["error"] == "ModelError", (name, found)
        assert found["seconds"] < hostile.SECONDS and found["bytes"] < hostile.BYTES, (name, found)
        cases.done()
    out = cli(f"adapter={paths[1]}", *TINY, expect=2)
    assert "has shape (2097152,)" in out and "Traceback" not in out
    assert not list(tmp_path.rglob("ran*"))
