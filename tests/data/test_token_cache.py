"""Cached tokens equal, bit for bit, those that this run would make, or they are not used."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import system

from runner.common import disk_cache, filesystem, sealed_json
from runner.common.errors import DataError
from runner.data import token_cache, token_cache_entry
from runner.data import tokenize as tokenize_module
from runner.data.token_cache_entry import COLUMNS, MANIFEST
from runner.data.token_set import TokenSet


def assert_equal(left, right):
    for split in ("train", "valid", "test"):
        left_tokens, right_tokens = getattr(left, split), getattr(right, split)
        for name in COLUMNS:
            left_array, right_array = getattr(left_tokens, name), getattr(right_tokens, name)
            assert left_array.dtype == right_array.dtype
            assert left_array.tobytes() == right_array.tobytes(), (split, name)
        assert left_tokens.fingerprint == right_tokens.fingerprint
    assert left.stats == right.stats


def test_cached_tokens_equal_those_made_without_a_cache(load, tokenized_files, load_uncached):
    cold = load()
    assert tokenized_files == ["train.jsonl", "valid.jsonl"]
    warm = load()
    assert tokenized_files == ["train.jsonl", "valid.jsonl"]
    uncached = load_uncached()
    assert_equal(cold, uncached)
    assert_equal(warm, uncached)
    assert warm.stats["train"].truncated > 0
    assert not cold.notes + warm.notes + uncached.notes
    for data in (cold, warm):
        assert isinstance(data.train.tokens.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            data.train.tokens[0] = 1


def test_the_cached_fingerprint_is_that_of_the_arrays(load):
    load()
    tokens = load().train
    recomputed = TokenSet(*(np.array(getattr(tokens, name)) for name in ("tokens", "supervised", "offsets", "lines")))
    assert "fingerprint" in vars(tokens)
    assert tokens.fingerprint == recomputed.fingerprint


def test_a_copied_data_set_uses_the_same_entries(load, folder, tokenized_files, tmp_path):
    cold = load()
    shutil.copytree(folder, tmp_path / "moved")
    assert_equal(cold, load(path=tmp_path / "moved"))
    assert len(tokenized_files) == 2


def test_small_files_are_not_cached(load, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_FILE_BYTES", (folder / "train.jsonl").stat().st_size + 1)
    load()
    assert not (tmp_path / "cache").exists()


def test_a_file_that_changes_while_it_is_read_is_not_cached(
    load, folder, monkeypatch, entries, load_uncached, replace_bytes
):
    tokenize_parts = tokenize_module.tokenize_parts

    def change_and_tokenize(parts, *arguments):
        if parts[0].file.name == "train.jsonl":
            replace_bytes(parts[0].file, b"what is 3?", b"what is 4?")
        return tokenize_parts(parts, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_module, "tokenize_parts", change_and_tokenize)
        data = load()
    assert "changed while it was read" in data.notes[0]
    assert len(entries()) == 1
    assert_equal(data, load_uncached())


def _flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def _pipe(file):
    file.unlink()
    os.mkfifo(file)


def _link(file):
    file.rename(file.parent.parent / "aside")
    file.symlink_to(file.parent.parent / "aside")


def _folder(file):
    file.unlink()
    file.mkdir()


DAMAGES = {
    "a flipped bit at the start": lambda file: _flip(file, 0),
    "a flipped bit inside": lambda file: _flip(file, file.stat().st_size // 2),
    "a flipped bit at the end": lambda file: _flip(file, -2),
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1),
    "emptied": lambda file: os.truncate(file, 0),
    "grown": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "missing": os.unlink,
    "a pipe": _pipe,
    "a link": _link,
    "a folder": _folder,
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("tokens", damage) for damage in DAMAGES),
        *((MANIFEST, damage) for damage in DAMAGES),
        *(
            (name, damage)
            for name in COLUMNS
            if name != "tokens"
            for damage in ("a flipped bit inside", "truncated", "missing")
        ),
    ],
)
def test_a_damaged_entry_is_reported_and_made_again(name, damage, load, entries, tokenized_files, load_uncached):
    load()
    [entry] = [entry for entry in entries() if _rows(entry) == 39]
    DAMAGES[damage](entry / name)
    repaired = load()
    assert [line for line in repaired.notes if f"the cached tokens in {entry} are damaged (" in line], repaired.notes
    assert len(repaired.notes) == 1
    assert tokenized_files[2:] == ["train.jsonl"]
    assert_equal(repaired, load_uncached())
    del tokenized_files[:]
    warm = load()
    assert (warm.notes, tokenized_files) == ([], [])
    assert_equal(warm, load_uncached())


def read_manifest(entry):
    return sealed_json.unseal((entry / MANIFEST).read_bytes(), max_values=2000)


def _rows(entry):
    return read_manifest(entry)["stats"]["rows"]


def test_an_entry_under_the_name_of_another_is_not_used(load, entries, tokenized_files):
    cold = load()
    overwritten, copied = entries()
    shutil.rmtree(overwritten)
    shutil.copytree(copied, overwritten)
    repaired = load()
    assert "it is the entry of another key" in repaired.notes[0]
    assert len(tokenized_files) == 3
    assert_equal(cold, repaired)


@pytest.mark.parametrize("change", [{"layout": 0}, {"stats": {"rows": 1, "more": 2}}, {"files": {}}, {"stats": None}])
def test_an_entry_with_an_unexpected_manifest_is_made_again(change, load, entries):
    cold = load()
    for entry in entries():
        (entry / MANIFEST).write_bytes(sealed_json.seal(read_manifest(entry) | change))
    repaired = load()
    assert len(repaired.notes) == 2
    assert_equal(cold, repaired)


@pytest.mark.parametrize("name", ["tokens", "supervised"])
def test_large_columns_are_checked_by_sample_with_other_blocks_at_each_start(name, load, entries, monkeypatch):
    monkeypatch.setattr(token_cache_entry, "FULLY_CHECKED_BYTES", 0)
    monkeypatch.setattr(token_cache_entry, "BLOCK_BYTES", 64)
    monkeypatch.setattr(token_cache_entry, "SAMPLED_BLOCKS", 2)
    load()
    [entry] = [entry for entry in entries() if _rows(entry) == 39]
    _flip(entry / name, (entry / name).stat().st_size // 2)
    starts = next(n for n in range(1000) if load().notes)
    assert starts < 999
    load()
    [entry] = [entry for entry in entries() if _rows(entry) == 39]
    _flip(entry / name, 0)
    assert load().notes


@pytest.mark.parametrize("name", ["offsets", "lines"])
def test_all_offsets_and_lines_are_checked_in_large_columns_too(name, load, entries, monkeypatch):
    monkeypatch.setattr(token_cache_entry, "FULLY_CHECKED_BYTES", 0)
    monkeypatch.setattr(token_cache_entry, "BLOCK_BYTES", 8)
    monkeypatch.setattr(token_cache_entry, "SAMPLED_BLOCKS", 1)
    load()
    [entry] = [entry for entry in entries() if _rows(entry) == 39]
    _flip(entry / name, 80)
    assert load().notes


def test_two_writers_of_the_same_entry_both_get_its_tokens(load, entries, monkeypatch):
    tokenize_parts, inner = tokenize_module.tokenize_parts, []

    def tokenize_and_load_again(*arguments):
        digest = tokenize_parts(*arguments)
        if not inner:
            inner.append(None)
            inner[0] = load()
        return digest

    monkeypatch.setattr(tokenize_module, "tokenize_parts", tokenize_and_load_again)
    outer = load()
    assert_equal(outer, inner[0])
    assert not outer.notes + inner[0].notes
    assert len(entries()) == 2
    assert_equal(outer, load())
    assert not list((entries()[0].parent).glob(".draft-*"))


@pytest.mark.slow
def test_two_processes_that_write_the_same_entry_both_finish(cli, write_rows):
    write_rows("data/train.jsonl", *({"text": "a b c d " * 60} for _ in range(400)))
    words = ["model=tiny", "data.path=data", "train.iters=2", "data.cache_folder=cache"]
    both = [cli.start(*words, f"hydra.run.dir={name}") for name in "ab"]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        assert "not cached" not in out
        assert "damaged" not in out
    [entry] = [path for path in (cli.folder / "cache").iterdir() if len(path.name) == 64]
    assert _rows(entry) == 400
    assert not list((cli.folder / "cache").glob(".draft-*"))


def _no_folder(cache, monkeypatch):
    cache.write_text("a file")


def _read_only(cache, monkeypatch):
    def mkdtemp(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(disk_cache.tempfile, "mkdtemp", mkdtemp)


def _full_disk(cache, monkeypatch):
    return system.file_size_limit(0)


def _full_disk_at_sync(cache, monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(filesystem, "_FULL_SYNC", None)
    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("fault", [_no_folder, _read_only, _full_disk, _full_disk_at_sync])
def test_a_cache_that_cannot_be_written_is_reported_once_and_tokens_are_made_in_memory(
    fault, load, tmp_path, monkeypatch, load_uncached
):
    uncached = load_uncached()
    with monkeypatch.context() as patch, fault(tmp_path / "cache", patch) or nullcontext():
        data = load()
    [line] = data.notes
    assert "tokens are not cached: " in line
    assert "data.cache_folder" in line
    assert_equal(data, uncached)
    if (tmp_path / "cache").is_dir():
        assert [path.name for path in (tmp_path / "cache").iterdir()] == []


def test_row_errors_are_reported_once_and_their_file_is_not_cached(load, folder, entries, monkeypatch):
    with (folder / "train.jsonl").open("a") as file:
        file.write("x\n")
    for fault in (lambda *_: None, _full_disk_at_sync):
        with monkeypatch.context() as patch:
            fault(None, patch)
            with pytest.raises(DataError) as caught:
                load()
        assert str(caught.value).startswith("1 row of the data")
    assert [_rows(entry) for entry in entries()] == [7]


def test_a_split_without_a_row_to_train_on_is_refused_with_a_cache_too(load, folder):
    (folder / "valid.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n")
    with pytest.raises(DataError, match=r"valid\.jsonl has no row to train on"):
        load()


def test_the_least_recently_used_entry_is_evicted(load, entries, write_rows, tokenized_files, conversations):
    sets = []
    for number in range(3):
        sets.append(
            write_rows(f"set{number}/train.jsonl", *conversations, {**conversations[0], "number": number}).parent
        )
    load(path=sets[0])
    size = sum(file.stat().st_size for file in entries()[0].iterdir())
    load(path=sets[1])
    for age, entry in enumerate(sorted(entries(), key=lambda entry: entry.stat().st_mtime)):
        os.utime(entry, (age - 1000, age - 1000))
    mapped = load(path=sets[0])  # marks it as used: the other entry is now the oldest
    assert len(tokenized_files) == 2
    load(path=sets[2], limit=2 * size + 100)
    assert len(entries()) == 2
    load(path=sets[0])
    assert len(tokenized_files) == 3
    load(path=sets[1], limit=size + 100)
    assert len(tokenized_files) == 4
    assert len(entries()) == 1
    assert mapped.train.tokens.sum() > 0  # the entry is removed, but its mapping stays valid


def test_an_entry_larger_than_the_limit_is_not_cached(load, entries, load_uncached):
    data = load(limit=100)
    assert entries() == []
    assert len(data.notes) == 2
    assert "exceed data.cache_gb=1e-07" in data.notes[0]
    assert_equal(data, load_uncached())


def test_unfinished_entries_of_killed_processes_are_removed_but_not_those_of_living_ones(load, tmp_path):
    dead, living, new = (tmp_path / "cache" / f".draft-{name}" for name in ("dead", "living", "new"))
    for unfinished in (dead, living, new):
        unfinished.mkdir(parents=True)
        (unfinished / "tokens").write_bytes(b"half")
        if unfinished is not new:
            os.utime(unfinished, (1, 1))
    handle = os.open(living, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    load()
    os.close(handle)
    assert [unfinished.exists() for unfinished in (dead, living, new)] == [False, True, True]


def test_a_run_whose_cache_is_deleted_resumes_bit_for_bit(
    tiny, train, folder, tmp_path, assert_equal_runs, tokenized_files, write_rows
):
    changes = {"data.path": str(folder), "data.cache_folder": str(tmp_path / "cache")}
    whole = train(tiny(**changes | {"data.cache": False}), tmp_path / "whole")
    parts = train(tiny(**changes), tmp_path / "parts", stop_at=5)
    assert len(tokenized_files) == 4
    shutil.rmtree(tmp_path / "cache")
    train(tiny(**changes), parts, resume=parts, stop_at=8)
    assert len(tokenized_files) == 6
    train(tiny(**changes), parts, resume=parts)
    assert len(tokenized_files) == 6
    assert_equal_runs(whole, parts)
