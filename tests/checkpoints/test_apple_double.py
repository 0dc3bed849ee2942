"""On a disk where macOS keeps ``._NAME`` beside NAME and removes it with NAME: see tests/apple_double.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from apple_double import keep_apple_doubles

from runner.cli.commands import verify
from runner.common.disk_cache import DiskCache
from runner.common.filesystem import FileSystem
from runner.config.schema import Config
from runner.runs.directory import RunDirectory


def doubles(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("._*")]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    keep_apple_doubles(folder, monkeypatch)
    return folder


def test_a_tree_is_removed_whose_names_vanish_meanwhile(disk: Path) -> None:
    for name in (f"{folder}{number}" for folder in ("", "b/", "b/d/") for number in range(8)):
        path = disk / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        FileSystem().write_file(path, b"x")
    assert len(doubles(disk)) == 27
    FileSystem().remove_tree(disk / "tree")
    assert os.listdir(disk) == []


def test_a_run_rotates_is_mirrored_resumed_and_verified(
    disk: Path,
    tiny: Callable[..., Config],
    train: Callable[..., Path],
    assert_equal_runs: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    settings = {"checkpoint.every": 2, "checkpoint.keep_last": 1, "train.eval_every": 4}
    (disk / "backup").mkdir()
    here = {**settings, "checkpoint.backup": str(disk / "backup")}
    train(tiny(**here), disk / "run", stop_at=7)
    run = train(tiny(**here), disk / "run", resume=disk / "run")
    assert_equal_runs(train(tiny(**settings), tmp_path / "elsewhere"), run)
    steps = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert steps == ["step-0000007", "step-0000012"], "the one that was resumed from, and the last"
    assert {name.removeprefix("._") for name in doubles(run / "checkpoints")} >= {*steps, "manifest.json"}
    (mirrored,) = (path for path in (disk / "backup").iterdir() if path.is_dir())
    assert verify.run([str(run)]) == verify.run([str(mirrored)]) == 0


def test_a_backup_has_none_of_the_files_of_the_run(
    tiny: Callable[..., Config], train: Callable[..., Path], tmp_path: Path
) -> None:
    """The backup's own disk stores what macOS has to store in another way."""
    (tmp_path / "backup").mkdir()
    settings = tiny(**{"train.iters": 4, "checkpoint.every": 2, "checkpoint.backup": str(tmp_path / "backup")})
    run = train(settings, tmp_path / "run", stop_at=2)
    for path in list(run.rglob("*")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    train(settings, run, resume=run)
    assert doubles(run) and not doubles(tmp_path / "backup")
    assert verify.run([str(run)]) == 0


def test_a_new_run_may_begin_in_a_folder_with_such_files(disk: Path) -> None:
    (disk / "run" / "checkpoints").mkdir(parents=True)
    (disk / "run/checkpoints/._old").write_bytes(b"")
    RunDirectory(disk / "run").claim()


def test_a_cache_removes_stale_drafts_and_old_entries(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(disk / "cache", max_entries=1)
    for key in ("a" * 32, "b" * 32):
        with cache.draft() as draft:
            FileSystem().write_file(draft.folder / "data", b"x" * 5000)
            draft.commit(key)
    assert cache.evict(newest="b" * 32) == ["a" * 32]
    stale = disk / "cache" / ".draft-killed"
    stale.mkdir()
    for name in ("data", "more"):
        FileSystem().write_file(stale / name, b"x")
    monkeypatch.setattr("runner.common.atomic_io._GRACE", -1.0)
    cache.clear_stale_drafts()
    assert [path.name for path in (disk / "cache").iterdir() if not path.name.startswith("._")] == ["b" * 32]
