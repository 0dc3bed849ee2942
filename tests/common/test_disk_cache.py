"""Entries are complete or absent; the least recently used ones go first; nothing that happens to the folder raises."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.common.disk_cache import CacheWriteError, DiskCache, cache_key

KEYS = [cache_key({"number": number}) for number in range(6)]


def fill(cache: DiskCache, key: str, size: int, age: float) -> None:
    with cache.draft() as draft:
        (draft.folder / "data").write_bytes(bytes(size))
        draft.commit(key)
    os.utime(cache.folder / key, (1e9 - age, 1e9 - age))


def test_equal_parts_have_equal_keys_whatever_their_order() -> None:
    assert cache_key({"a": 1, "b": [2]}) == cache_key({"b": [2], "a": 1}) != cache_key({"a": 1, "b": [3]})


def test_a_record_comes_back_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache")
    assert cache.read_record(KEYS[0]) is None
    cache.write_record(KEYS[0], {"loss": 1.5})
    assert cache.read_record(KEYS[0]) == {"loss": 1.5}
    path = cache.folder / f"{KEYS[0]}.json"
    path.write_text(path.read_text().replace("1.5", "2.5"))
    assert cache.read_record(KEYS[0]) is None
    path.unlink()
    os.mkfifo(path)
    assert cache.read_record(KEYS[0]) is None


def test_records_beyond_the_limit_go_by_least_recent_use(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_entries=3)
    for age, key in enumerate(KEYS[:3]):
        cache.write_record(key, {"a": 1})
        os.utime(tmp_path / f"{key}.json", (1000 + age, 1000 + age))
    assert cache.read_record(KEYS[0]) == {"a": 1}  # which is a use
    cache.write_record(KEYS[3], {"a": 1})
    assert [key for key in KEYS if cache.read_record(key)] == [KEYS[0], KEYS[2], KEYS[3]]


def test_folders_beyond_the_limit_go_by_least_recent_use_and_the_newest_last(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=250)
    for age, key in enumerate(KEYS[:3]):
        fill(cache, key, 100, age)
    (tmp_path / "letter.txt").write_text("not an entry")
    cache.touch(KEYS[2])
    assert cache.evict(newest=KEYS[0]) == [KEYS[1]]
    assert cache.evict(newest=KEYS[0], newest_bytes=200) == [KEYS[2]]
    assert cache.evict(newest=KEYS[0], newest_bytes=300) == [KEYS[0]]
    assert cache.evict(newest=KEYS[5], newest_bytes=100) == []
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_what_was_written_of_a_sparse_file_counts(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, max_bytes=1 << 20)
    fill(cache, KEYS[0], 1, 0)
    with open(tmp_path / KEYS[0] / "data", "r+b") as file:
        file.truncate(1 << 30)
    assert cache.evict(newest=KEYS[1], newest_bytes=1000) == []


def test_a_draft_is_no_entry_until_it_is_committed_and_gone_if_it_never_is(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    with cache.draft() as draft:
        (draft.folder / "data").write_bytes(b"1")
        assert not (tmp_path / KEYS[0]).exists()
    assert list(tmp_path.iterdir()) == []
    fill(cache, KEYS[0], 3, 0)
    fill(cache, KEYS[0], 4, 0)  # another process was faster: its entry stays
    assert [path.name for path in tmp_path.iterdir()] == [KEYS[0]]
    assert (tmp_path / KEYS[0] / "data").stat().st_size == 3


def test_a_stale_draft_is_cleared_unless_its_process_lives(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path)
    program = (
        "import sys; from pathlib import Path; from runner.common.disk_cache import DiskCache\n"
        "draft = DiskCache(Path(sys.argv[1])).draft(); print(draft.folder, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    held = Path(process.stdout.readline().strip())
    (tmp_path / f".{KEYS[0]}.json.0123abcd.tmp").write_bytes(b"{")
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    cache.clear_stale_drafts()
    assert list(tmp_path.iterdir()) == [held]
    process.kill()
    process.wait()
    cache.clear_stale_drafts()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_error_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = DiskCache(tmp_path / "file" / "cache")
    for write in (lambda: cache.write_record(KEYS[0], {"a": 1}), cache.draft):
        with pytest.raises(CacheWriteError, match=r"file/cache: Not a directory"):
            write()
    assert cache.read_record(KEYS[0]) is None
    assert cache.evict(newest=KEYS[0]) == []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("runner.common.filesystem._write", full)
    with pytest.raises(CacheWriteError, match=r"No space left on device"):
        DiskCache(tmp_path).write_record(KEYS[0], {"a": 1})
