"""Reading a checkpoint: every damage is found, and nothing hostile is followed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoints import manifest
from runner.checkpoints.store import CheckpointStore
from runner.common import sealed_json
from runner.common.errors import CheckpointError

FILES = {
    "adapters.safetensors": random.Random(1).randbytes(3000),
    "adapter_config.json": b'{"rank": 8}',
    "optimizer.safetensors": random.Random(2).randbytes(1000),
    "train_state.json": b'{"step": 100}',
}


def _files(mark: str) -> dict[str, bytes]:
    return FILES | {"train_state.json": mark.encode()}


def _mark(loaded: Any) -> str | None:
    return loaded and loaded.files["train_state.json"].decode()


def _reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit a manifest as someone would who knows how it is sealed."""
    record = json.loads((path / "manifest.json").read_bytes())
    del record["sha256"]
    change(record)
    (path / "manifest.json").write_bytes(sealed_json.seal(record))


def test_any_flipped_bit_of_any_file_is_detected_and_the_previous_checkpoint_is_used(store: CheckpointStore) -> None:
    store.commit(100, _files("old"))
    path = store.commit(200, _files("new"), save_reasons=["best"], metrics={"valid_loss": 1.5}).path
    rng = random.Random(0)
    for name in [*FILES, "manifest.json"]:
        whole = (path / name).read_bytes()
        bits = list(range(len(whole) * 8))
        for bit in bits if len(bits) <= 200 else rng.sample(bits, 200):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(data)
            with pytest.raises(CheckpointError, match=name):
                store.load(path)
        loaded, problems = store.newest_valid()
        assert _mark(loaded) == "old"
        assert len(problems) == 1
        assert str(path / name) in problems[0]
        (path / name).write_bytes(whole)
    assert _mark(store.newest_valid()[0]) == "new"


def test_any_flipped_bit_of_a_manifest_is_detected() -> None:
    files = {"a": manifest.FileRecord(5, "0" * 64)}
    whole = manifest.write(manifest.CheckpointManifest("run-1", 100, "2026", ("best",), {"valid_loss": 1.5}, files))
    assert manifest.read(whole).step == 100
    for bit in range(len(whole) * 8):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="it"):
            manifest.read(bytes(data))


def test_any_truncation_or_growth_of_any_file_is_detected(store: CheckpointStore) -> None:
    store.commit(100, _files("old"))
    path = store.commit(200, _files("new")).path
    for name in [*FILES, "manifest.json"]:
        whole = (path / name).read_bytes()
        lengths = {
            *range(20),
            *range(len(whole) - 20, len(whole)),
            *range(0, len(whole), len(whole) // 20 + 1),
        }
        for length in sorted(length for length in lengths if 0 <= length < len(whole)):
            (path / name).write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=name):
                store.load(path)
        (path / name).write_bytes(whole + b"\0")
        loaded, problems = store.newest_valid()
        assert (_mark(loaded), len(problems)) == ("old", 1)
        (path / name).unlink()
        loaded, problems = store.newest_valid()
        assert (_mark(loaded), len(problems)) == ("old", 1)
        assert name in problems[0]
        (path / name).write_bytes(whole)


def test_files_that_the_manifest_does_not_list_are_ignored(store: CheckpointStore) -> None:
    path = store.commit(100, FILES).path
    (path / "notes.txt").write_text("mine")
    (path / "sub").mkdir()
    assert store.load(path).files == FILES


def test_a_copy_loads_under_any_name_but_that_of_another_step(store: CheckpointStore, tmp_path: Path) -> None:
    path = store.commit(100, FILES).path
    shutil.copytree(path, tmp_path / "kept")
    assert store.load(tmp_path / "kept").files == FILES
    shutil.copytree(path, store.folder / "step-0000900")
    with pytest.raises(CheckpointError, match="it is of step 100"):
        store.load(store.folder / "step-0000900")
    assert store.newest_valid()[0].checkpoint.step == 100


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", ".", "sub/a", "a\0b", "", "\ud800"])
def test_a_manifest_that_names_a_file_outside_the_checkpoint_is_refused(store: CheckpointStore, name: str) -> None:
    path = store.commit(100, FILES).path
    secret = store.folder / "secret"
    secret.write_bytes(b"secret")
    record = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    _reseal(path, lambda manifest: manifest["files"].update({name: record}))
    with pytest.raises(CheckpointError, match="is not allowed") as caught:
        store.load(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(schema=2), "its schema is 2; this version reads 1"),
        (lambda record: record.update(schema=True), "its schema is True"),
        (lambda record: record.update(schema="1"), "its schema is '1'"),
        (lambda record: record.pop("schema"), "its schema is None"),
        (lambda record: record.pop("why"), "keys"),
        (lambda record: record.update(extra=1), "keys"),
        (lambda record: record.update(step=-1), "step"),
        (lambda record: record.update(step=100.0), "step"),
        (lambda record: record.update(step="100"), "step"),
        (lambda record: record.update(run_id=7), "run id"),
        (lambda record: record.update(run_id="x" * 501), "run id"),
        (lambda record: record.update(created=None), "created"),
        (lambda record: record.update(why="best"), "why"),
        (lambda record: record.update(why=[1]), "why"),
        (lambda record: record.update(metrics=[]), "metrics"),
        (lambda record: record.update(metrics={"a": "1"}), "metric 'a'"),
        (lambda record: record.update(metrics={"a": True}), "metric 'a'"),
        (lambda record: record.update(metrics={"a": 10**400}), "401 digits"),
        (lambda record: record.update(files=[]), "files"),
        (lambda record: record.update(files={}), "no files"),
        (lambda record: record["files"].update(a=1), "'a'"),
        (lambda record: record["files"].update(a={"size": 1}), "'a'"),
        (lambda record: record["files"].update(a={"size": -1, "sha256": "0" * 64}), "size of a"),
        (lambda record: record["files"].update(a={"size": 10**19, "sha256": "0" * 64}), "size of a"),
        (lambda record: record["files"].update(a={"size": 1, "sha256": "0" * 63 + "G"}), "SHA-256 of a"),
        (lambda record: record["files"].update(a={"size": 1, "sha256": "0" * 64}), "/a: missing"),
        (
            lambda record: record["files"].update({"manifest.json": {"size": 1, "sha256": "0" * 64}}),
            "not allowed",
        ),
    ],
)
def test_a_manifest_with_wrong_members_is_refused(store: CheckpointStore, change: Callable, message: str) -> None:
    path = store.commit(100, FILES).path
    _reseal(path, change)
    with pytest.raises(CheckpointError) as caught:
        store.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[" * 100_000, b"\xff" * 100, b"null", b"\0" * 5000, b" " * ((1 << 20) + 1)],
    ids=["empty", "bare", "deep", "binary", "null", "zeros", "large"],
)
def test_a_file_that_is_not_a_manifest_is_refused(store: CheckpointStore, data: bytes) -> None:
    path = store.commit(100, FILES).path
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        store.load(path)
    assert store.checkpoints() == []


def test_a_sealed_manifest_with_a_duplicate_key_is_refused() -> None:
    body = b'{"schema": 1, "schema": 1' + b',\n "sha256": "'
    with pytest.raises(ValueError, match="'schema' appears twice"):
        manifest.read(body + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n')


@pytest.mark.parametrize("name", ["adapters.safetensors", "manifest.json", "unlisted"])
@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_a_link_or_a_fifo_in_a_checkpoint_is_refused(
    store: CheckpointStore, folder: Path, name: str, kind: str
) -> None:
    path = store.commit(100, FILES).path
    outside = folder / "outside"
    shutil.copytree(path, outside)
    (path / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to(outside / name)
    loaded, problems = store.newest_valid()
    assert loaded is None
    assert str(path / name) in problems[0]
