"""Files and folders are replaced as a whole, whatever fails, stops or loses its power."""

from __future__ import annotations

import errno
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest

from runner.common.atomic_io import (
    create_atomically,
    is_draft,
    is_draft_folder,
    is_stale,
    repair_replaced_folder,
    replace_folder,
    write_atomically,
)
from runner.common.errors import ConfigError, ModelError, StorageError
from runner.common.filesystem import FileSystem


@pytest.mark.parametrize("call", ["create", "write", "fsync", "rename"])
def test_a_failed_write_keeps_the_old_content_and_leaves_no_draft(folder: Path, tape, call: str) -> None:
    target = folder / "status.json"
    write_atomically(target, "old")
    at = ["create", "write", "fsync", "close", "rename"].index(call)
    with tape(fail_at=at, error=errno.ENOSPC), pytest.raises(StorageError, match="No space") as raised:
        write_atomically(target, "new")
    assert str(raised.value).startswith(f"{target}: cannot be written") and ".tmp" not in str(raised.value)
    assert target.read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["status.json"]


def test_a_killed_write_keeps_the_old_or_the_new_content_and_a_recognisable_draft(folder: Path, tape, killed) -> None:
    target = folder / "status.json"
    for at in range(100):
        write_atomically(target, "old")
        with tape(stop_at=at, piece=2) as calls, suppress(killed):
            write_atomically(target, "new")
        assert target.read_text() in ("old", "new")
        drafts = [path for path in folder.iterdir() if path != target]
        assert all(is_draft(path.name) for path in drafts)
        if not calls.was_hit:
            break
    assert at > 3


@pytest.mark.parametrize("durable", [True, False])
def test_after_a_power_cut_a_file_holds_the_old_or_the_new_content(
    tmp_path: Path, folder: Path, tape, power_cut, durable: bool
) -> None:
    target = folder / "status.json"
    target.write_text("old content")
    disk = power_cut(folder)
    with tape(piece=4) as calls:
        write_atomically(target, "new content", durable=durable)
    rng = random.Random(0)
    for moment in range(len(calls.events) + 1):
        for attempt in range(5):
            after = tmp_path / f"{moment}-{attempt}"
            disk.leave(after, rng if attempt else None)
            content = (after / "status.json").read_text()
            assert content in ("old content", "new content")
        if moment < len(calls.events):
            disk.apply(calls.events[moment])
    assert not durable or content == "new content"


def test_a_generator_that_raises_abandons_the_write(folder: Path) -> None:
    def chunks():
        yield b"half"
        raise ModelError("wrong checksum")

    with pytest.raises(ModelError):
        write_atomically(folder / "model.gguf", chunks())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", [".hydra", ".lock", ".letter.txt", ".notes.yaml", ".status.json.tmp"])
def test_only_drafts_are_taken_for_drafts(name: str) -> None:
    assert not is_draft(name)


def test_a_created_folder_appears_whole_or_not_at_all(folder: Path) -> None:
    with create_atomically(folder / "export", is_folder=True) as draft:
        (draft / "a").write_bytes(b"1")
        assert not (folder / "export").exists()
    assert (folder / "export" / "a").read_bytes() == b"1"
    with pytest.raises(ModelError), create_atomically(folder / "other", is_folder=True) as draft:
        (draft / "a").write_bytes(b"1")
        raise ModelError("no")
    with pytest.raises(ConfigError, match="meanwhile"), create_atomically(folder / "third", is_folder=True):
        (folder / "third").mkdir()
    assert sorted(path.name for path in folder.iterdir()) == ["export", "third"]


def test_a_file_is_created_with_its_name_and_leaves_no_folder(folder: Path) -> None:
    with create_atomically(folder / "model.gguf", is_folder=False) as draft:
        assert draft.name == "model.gguf" and is_draft_folder(draft.parent.name)
        draft.write_bytes(b"1")
    assert (folder / "model.gguf").read_bytes() == b"1" and len(list(folder.iterdir())) == 1


def test_an_error_names_what_is_created_and_not_its_draft(folder: Path) -> None:
    for name, is_folder in (("model.gguf", False), ("export", True)):
        with pytest.raises(ModelError) as raised, create_atomically(folder / name, is_folder=is_folder) as draft:
            raise ModelError(f"{draft}: cannot be read")
        assert str(raised.value) == f"{folder / name}: cannot be read"


def test_a_draft_is_stale_once_nothing_writes_it(folder: Path) -> None:
    with create_atomically(folder / "export", is_folder=True) as draft:
        assert is_draft_folder(draft.name) and not is_draft_folder("export-1.tmp")
        os.utime(draft, (1, 1))
        assert not is_stale(draft)
        left = folder / draft.name.replace("export", "other")
        left.mkdir()
        assert not is_stale(left)  # new: its process may be about to hold it
        os.utime(left, (1, 1))
        assert is_stale(left)


def test_another_attempt_removes_what_a_killed_one_left(folder: Path) -> None:
    names = [".export.01234567.tmp", ".export.89abcdef.tmp", ".export.f16.01234567.tmp", ".other.01234567.tmp"]
    for name in names:
        (folder / name).mkdir()
        os.utime(folder / name, (1, 1))
    (folder / names[1]).touch()  # new: another process may be writing it
    with create_atomically(folder / "export", is_folder=True):
        assert not (folder / names[0]).exists()
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names[1:], "export"])


def test_a_replaced_folder_is_the_old_or_the_new_one_after_a_kill_at_any_call(tmp_path: Path, tape, killed) -> None:
    old, new = {"a": b"old", "b": b"old"}, {"a": b"new"}
    for at in range(100):
        target = tmp_path / str(at) / "adapters"
        target.parent.mkdir()
        replace_folder(target, old, FileSystem())
        with tape(stop_at=at) as calls, suppress(killed):
            replace_folder(target, new, FileSystem())
        repair_replaced_folder(target, FileSystem())
        assert {path.name: path.read_bytes() for path in target.iterdir()} in (old, new)
        replace_folder(target, new, FileSystem())
        assert [path.name for path in target.parent.iterdir()] == ["adapters"]
        if not calls.was_hit:
            break
    assert at > 5
