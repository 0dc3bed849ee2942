"""The file system as checkpoints use it: what it refuses, what it says, what it never touches."""

from __future__ import annotations

import errno
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.common import filesystem
from runner.common.errors import CheckpointError, StorageError
from runner.common.filesystem import FileSystem
from runner.common.text import format_bytes


def test_a_file_is_written_whole_when_the_system_writes_a_few_bytes_at_a_time(folder: Path, tape) -> None:
    with tape(piece=3) as calls:
        FileSystem().write_file(folder / "a", b"0123456789")
    assert (folder / "a").read_bytes() == b"0123456789"
    assert calls.calls == ["create", "write", "write", "write", "write", "fsync"]


def test_an_existing_file_is_never_overwritten(folder: Path) -> None:
    (folder / "a").write_bytes(b"mine")
    with pytest.raises(StorageError, match=r"/a: cannot be written: File exists \(EEXIST\)"):
        FileSystem().write_file(folder / "a", b"yours")
    assert (folder / "a").read_bytes() == b"mine"


@pytest.mark.parametrize("target", ["there", "dangling"])
def test_a_file_is_not_written_through_a_link(folder: Path, target: str) -> None:
    (folder / "there").write_bytes(b"mine")
    (folder / "link").symlink_to(folder / target)
    with pytest.raises(StorageError, match="link"):
        FileSystem().write_file(folder / "link", b"yours")
    assert (folder / "there").read_bytes() == b"mine"
    assert not (folder / "dangling").exists()


@pytest.mark.parametrize("call", ["create", "write", "fsync", "close"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_each_failure_of_a_write_names_path_and_reason(folder: Path, tape, call: str, error: int) -> None:
    at = ["create", "write", "fsync", "close"].index(call)
    with tape(fail_at=at, error=error), pytest.raises(StorageError) as caught:
        FileSystem().write_file(folder / "a", b"x" * 2000)
    message = str(caught.value)
    assert str(folder / "a") in message
    assert errno.errorcode[error] in message
    assert os.strerror(error) in message
    if error in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert "needs 2.0 kB, has " in message


def test_no_file_descriptor_stays_open_after_a_failure(folder: Path, tape) -> None:
    (folder / "sub").mkdir()
    lowest = os.dup(0)
    os.close(lowest)
    for at in range(4):
        with tape(fail_at=at, error=errno.EIO), pytest.raises(StorageError):
            FileSystem().write_file(folder / f"{at}", b"x")
    for path in (folder / "sub", folder / "missing"):
        with pytest.raises(CheckpointError):
            FileSystem().read_file(path, 10)
    again = os.dup(0)
    os.close(again)
    assert again == lowest


def test_a_file_is_read_up_to_its_limit(folder: Path) -> None:
    (folder / "a").write_bytes(b"12345")
    assert FileSystem().read_file(folder / "a", 5) == b"12345"
    with pytest.raises(CheckpointError, match="5 bytes, more than the limit of 4"):
        FileSystem().read_file(folder / "a", 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to("/etc/hostname"), "symbolic link"),
        (lambda path: path.symlink_to(path), "symbolic link"),
    ],
)
def test_only_regular_files_are_read(folder: Path, make: Callable[[Path], None], message: str) -> None:
    make(folder / "a")
    for read in (lambda path: FileSystem().read_file(path, 100), FileSystem().sha256):
        with pytest.raises(CheckpointError, match=message):
            read(folder / "a")


@pytest.mark.parametrize(
    ("error", "kind"),
    [(errno.EIO, CheckpointError), (errno.EBADMSG, CheckpointError), (errno.EMFILE, StorageError)],
)
def test_a_bad_sector_is_damage_and_a_lack_of_file_descriptors_is_not(
    folder: Path, tape, error: int, kind: type
) -> None:
    (folder / "a").write_bytes(b"x")

    class Bad(tape):
        def open(self, *_: object) -> int:
            raise OSError(error, os.strerror(error))

    with Bad(), pytest.raises(kind, match=errno.errorcode[error]):
        FileSystem().read_file(folder / "a", 1)


def test_removing_a_tree_does_not_touch_the_targets_of_its_links(folder: Path) -> None:
    outside = folder / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "file").write_bytes(b"mine")
    victim = folder / "victim"
    (victim / "sub").mkdir(parents=True)
    (victim / "sub" / "file").write_bytes(b"x")
    (victim / "to_folder").symlink_to(outside)
    (victim / "sub" / "to_file").symlink_to(outside / "deep" / "file")
    os.mkfifo(victim / "sub" / "fifo")
    FileSystem().remove_tree(victim)
    assert not victim.exists()
    (folder / "link").symlink_to(outside)
    FileSystem().remove_tree(folder / "link")
    assert not (folder / "link").is_symlink()
    assert (outside / "deep" / "file").read_bytes() == b"mine"


def test_a_tree_too_deep_to_remove_is_removed_or_a_storage_error(folder: Path) -> None:
    (folder / "/".join(["d"] * 150)).mkdir(parents=True)
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 120)
    try:
        FileSystem().remove_tree(folder / "d")
    except StorageError as error:  # a Python whose fwalk recurses
        assert "/d: cannot be removed: folders nested too deeply" in str(error)
    else:
        assert not (folder / "d").exists()
    finally:
        sys.setrecursionlimit(usual)


@pytest.mark.parametrize(("error", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_without_folder_sync_is_fine_and_a_failing_one_is_not(
    folder: Path, tape, error: int, passes: bool
) -> None:
    with tape(fail_at=0, error=error):
        if passes:
            FileSystem().fsync_folder(folder)
        else:
            with pytest.raises(StorageError, match="EIO"):
                FileSystem().fsync_folder(folder)


@pytest.mark.parametrize(("error", "calls"), [(0, []), (errno.ENOTSUP, ["fsync"]), (errno.EIO, [])])
def test_on_a_mac_the_cache_of_the_drive_is_flushed(
    folder: Path, tape, monkeypatch: pytest.MonkeyPatch, error: int, calls: list[str]
) -> None:
    asked = []

    def full_sync(handle: int, command: int) -> None:
        asked.append(command)
        if error:
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(filesystem, "_FULL_SYNC", 51)
    monkeypatch.setattr(filesystem.fcntl, "fcntl", full_sync)
    with tape() as used:
        if error == errno.EIO:
            with pytest.raises(StorageError, match="EIO"):
                FileSystem().write_file(folder / "a", b"1")
        else:
            FileSystem().write_file(folder / "a", b"1")
    assert asked == [51]
    assert used.calls == ["create", "write", *calls]


def test_lstat_distinguishes_kinds_without_following_links(folder: Path) -> None:
    (folder / "file").write_bytes(b"123")
    (folder / "link").symlink_to(folder / "file")
    os.mkfifo(folder / "fifo")
    found = {name: FileSystem().lstat(folder / name) for name in ("file", "link", "fifo", "none", "file/below")}
    assert {name: entry and entry.kind for name, entry in found.items()} == {
        "file": "file",
        "link": "link",
        "fifo": "other",
        "none": None,
        "file/below": None,
    }
    assert found["file"].size == 3
    assert FileSystem().lstat(folder).kind == "folder"


def test_sizes_are_formatted_with_units() -> None:
    assert [format_bytes(size) for size in (0, 999, 1000, 16_300_000, 2 * 10**15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "16.3 MB",
        "2000.0 TB",
    ]


def test_checkpoints_import_neither_mlx_nor_hydra_nor_training() -> None:
    program = """
import sys
import runner.common.filesystem, runner.checkpoints.manifest, runner.checkpoints.retention
import runner.checkpoints.save_policy, runner.checkpoints.store, runner.checkpoints.safetensors_file
heavy = {"mlx", "mlx_lm", "hydra", "omegaconf", "safetensors"} | {"runner.training", "runner.data"}
print(sorted(heavy & set(sys.modules)))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
