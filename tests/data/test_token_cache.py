"""What an earlier run left on disk is what this run would make, bit for bit, or it is not used."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from runner.common.errors import DataError
from runner.data import token_cache, token_cache_entry
from runner.data import tokenize as loading
from runner.data.token_cache_entry import COLUMNS, MANIFEST
from runner.data.token_set import TokenSet


def assert_equal(one, other):
    for split in ("train", "valid", "test"):
        first, second = getattr(one, split), getattr(other, split)
        for name in COLUMNS:
            left, right = getattr(first, name), getattr(second, name)
            assert left.dtype == right.dtype
            assert left.tobytes() == right.tobytes(), (split, name)
        assert first.fingerprint == second.fingerprint
    assert one.counts == other.counts


def test_what_is_mapped_equals_what_was_made_and_what_is_made_without(load, tokenised, tokenizer, reading, folder):
    cold = load()
    assert tokenised == ["train.jsonl", "valid.jsonl"]
    warm = load()
    assert tokenised == ["train.jsonl", "valid.jsonl"]
    without = loading.load_dataset(str(folder), tokenizer, reading(max_length=50))
    assert_equal(cold, without)
    assert_equal(warm, without)
    assert warm.counts["train"].truncated > 0
    assert not cold.notes + warm.notes + without.notes
    for data in (cold, warm):
        assert isinstance(data.train.tokens.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            data.train.tokens[0] = 1


def test_the_fingerprint_that_is_kept_is_that_of_the_arrays(load):
    load()
    tokens = load().train
    again = TokenSet(*(np.array(getattr(tokens, name)) for name in ("tokens", "supervised", "offsets", "lines")))
    assert "fingerprint" in vars(tokens)
    assert tokens.fingerprint == again.fingerprint


def test_a_moved_data_set_is_found(load, folder, tokenised, tmp_path):
    cold = load()
    shutil.copytree(folder, tmp_path / "moved")
    assert_equal(cold, load(path=tmp_path / "moved"))
    assert len(tokenised) == 2


def test_small_files_are_left_alone(load, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "SMALLEST", (folder / "train.jsonl").stat().st_size + 1)
    load()
    assert not (tmp_path / "cache").exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    load, folder, monkeypatch, entries, tokenizer, reading, rewrite
):
    own = loading.tokenize_file

    def tokenise_file(file, *rest):
        if file.name == "train.jsonl":
            rewrite(file, b"what is 3?", b"what is 4?")
        return own(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loading, "tokenize_file", tokenise_file)
        data = load()
    assert "changed while it was read" in data.notes[0]
    assert len(entries()) == 1
    assert_equal(data, loading.load_dataset(str(folder), tokenizer, reading(max_length=50)))


def _flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
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
    "cut": lambda file: os.truncate(file, file.stat().st_size - 1),
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
            for damage in ("a flipped bit inside", "cut", "missing")
        ),
    ],
)
def test_a_damaged_entry_is_said_made_anew_and_then_good(name, damage, load, entries, tokenised, fresh):
    load()
    [entry] = [entry for entry in entries() if _rows(entry) == 39]
    DAMAGES[damage](entry / name)
    again = load()
    assert [line for line in again.notes if f"the tokens kept in {entry} are damaged (" in line], again.notes
    assert len(again.notes) == 1
    assert tokenised[2:] == ["train.jsonl"]
    assert_equal(again, fresh())
    del tokenised[:]
    warm = load()
    assert (warm.notes, tokenised) == ([], [])
    assert_equal(warm, fresh())


def _rows(entry):
    return token_cache_entry.unseal((entry / MANIFEST).read_bytes())["counts"]["rows"]


def test_the_entry_of_other_tokens_is_not_taken(load, entries, tokenised):
    cold = load()
    one, other = entries()
    shutil.rmtree(one)
    shutil.copytree(other, one)
    again = load()
    assert "other tokens than its name says" in again.notes[0]
    assert len(tokenised) == 3
    assert_equal(cold, again)


@pytest.mark.parametrize("change", [{"layout": 0}, {"counts": {"rows": 1, "more": 2}}, {"files": {}}, {"counts": None}])
def test_a_manifest_of_another_form_is_no_exception(change, load, entries):
    cold = load()
    for entry in entries():
        about = token_cache_entry.unseal((entry / MANIFEST).read_bytes())
        (entry / MANIFEST).write_bytes(token_cache_entry.seal(about | change))
    again = load()
    assert len(again.notes) == 2
    assert_equal(cold, again)


@pytest.mark.parametrize("name", ["tokens", "supervised"])
def test_of_large_files_some_blocks_are_checked_others_each_time(name, load, entries, monkeypatch):
    monkeypatch.setattr(token_cache_entry, "CHECKED_WHOLE", 0)
    monkeypatch.setattr(token_cache_entry, "BLOCK", 64)
    monkeypatch.setattr(token_cache_entry, "SAMPLED", 2)
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
def test_of_large_files_offsets_and_lines_are_checked_whole(name, load, entries, monkeypatch):
    monkeypatch.setattr(token_cache_entry, "CHECKED_WHOLE", 0)
    monkeypatch.setattr(token_cache_entry, "BLOCK", 8)
    monkeypatch.setattr(token_cache_entry, "SAMPLED", 1)
    load()
    [entry] = [entry for entry in entries() if _rows(entry) == 39]
    _flip(entry / name, 80)
    assert load().notes


def test_two_that_write_the_same_at_once_both_have_it(load, entries, monkeypatch):
    own, inner = loading.tokenize_file, []

    def tokenise_file(*words):
        done = own(*words)
        if not inner:
            inner.append(None)
            inner[0] = load()
        return done

    monkeypatch.setattr(loading, "tokenize_file", tokenise_file)
    outer = load()
    assert_equal(outer, inner[0])
    assert not outer.notes + inner[0].notes
    assert len(entries()) == 2
    assert_equal(outer, load())
    assert not list((entries()[0].parent).glob(f"{token_cache_entry.DRAFT}*"))


@pytest.mark.slow
def test_two_processes_at_once(cli, write_rows):
    write_rows("data/train.jsonl", *({"text": "a b c d " * 60} for _ in range(400)))
    words = ["model=tiny", "data.path=data", "train.iters=2", "data.cache_folder=cache"]
    both = [cli.start(*words, f"hydra.run.dir={name}") for name in "ab"]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        assert "not kept" not in out
        assert "damaged" not in out
    [entry] = [path for path in (cli.folder / "cache").iterdir() if len(path.name) == 64]
    assert _rows(entry) == 400
    assert not list((cli.folder / "cache").glob(f"{token_cache_entry.DRAFT}*"))


def _no_folder(cache, monkeypatch):
    cache.write_text("a file")


def _read_only(cache, monkeypatch):
    def mkdtemp(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(token_cache_entry.tempfile, "mkdtemp", mkdtemp)


def _full(cache, monkeypatch):
    def created(path):
        return open("/dev/full", "w+b")

    monkeypatch.setattr(token_cache_entry, "_created", created)


def _full_at_the_end(cache, monkeypatch):
    def fsync(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_cache_entry.os, "fsync", fsync)


@pytest.mark.parametrize("fault", [_no_folder, _read_only, _full, _full_at_the_end])
def test_where_nothing_can_be_kept_one_line_says_so_and_tokens_are_made(
    fault, load, folder, tmp_path, monkeypatch, tokenizer, reading
):
    if fault is _full and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    without = loading.load_dataset(str(folder), tokenizer, reading(max_length=50))
    with monkeypatch.context() as patch:
        fault(tmp_path / "cache", patch)
        data = load()
    [line] = data.notes
    assert "tokens are not kept on disk: " in line
    assert "data.cache_folder" in line
    assert_equal(data, without)
    if (tmp_path / "cache").is_dir():
        assert [path.name for path in (tmp_path / "cache").iterdir()] == []


def test_bad_rows_are_reported_once_and_nothing_is_kept_of_their_file(load, folder, entries, monkeypatch):
    with (folder / "train.jsonl").open("a") as file:
        file.write("x\n")
    for fault in (lambda *_: None, _full_at_the_end):
        with monkeypatch.context() as patch:
            fault(None, patch)
            with pytest.raises(DataError) as caught:
                load()
        assert str(caught.value).startswith("1 row of the data")
    assert [_rows(entry) for entry in entries()] == [7]


def test_a_split_without_a_row_is_refused_as_ever(load, folder):
    (folder / "valid.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n")
    with pytest.raises(DataError, match=r"valid\.jsonl has no row to learn from"):
        load()


def test_the_least_recently_used_gives_way(load, entries, write_rows, tokenised, conversations):
    sets = []
    for number in range(3):
        sets.append(
            write_rows(f"set{number}/train.jsonl", *conversations, {**conversations[0], "number": number}).parent
        )
    load(path=sets[0])
    size = sum(file.stat().st_size for file in entries()[0].iterdir())
    load(path=sets[1])
    for age, entry in enumerate(sorted(entries(), key=lambda entry: (entry / MANIFEST).stat().st_mtime)):
        os.utime(entry / MANIFEST, (age - 1000, age - 1000))
    oldest = load(path=sets[0])  # used now: the other is the oldest
    assert len(tokenised) == 2
    load(path=sets[2], limit=2 * size + 100)
    assert len(entries()) == 2
    load(path=sets[0])
    assert len(tokenised) == 3
    load(path=sets[1], limit=size + 100)
    assert len(tokenised) == 4
    assert len(entries()) == 1
    assert oldest.train.tokens.sum() > 0  # its files are gone, its mapping is not


def test_what_is_larger_than_the_limit_is_not_kept(load, folder, entries, tokenizer, reading):
    data = load(limit=100)
    assert entries() == []
    assert len(data.notes) == 2
    assert "over data.cache_gb=1e-07" in data.notes[0]
    assert_equal(data, loading.load_dataset(str(folder), tokenizer, reading(max_length=50)))


def test_what_killed_processes_left_is_cleared_and_what_living_ones_write_is_not(load, tmp_path):
    dead, living, new = (tmp_path / "cache" / f"{token_cache_entry.DRAFT}{name}" for name in ("dead", "living", "new"))
    for left in (dead, living, new):
        left.mkdir(parents=True)
        (left / "tokens").write_bytes(b"half")
        if left is not new:
            os.utime(left, (1, 1))
    handle = os.open(living, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    load()
    os.close(handle)
    assert [left.exists() for left in (dead, living, new)] == [False, True, True]


def test_a_run_whose_cache_is_deleted_goes_on_bit_for_bit(
    tiny, train, folder, tmp_path, assert_equal_runs, tokenised, write_rows
):
    changes = {"data.path": str(folder), "data.cache_folder": str(tmp_path / "cache")}
    whole = train(tiny(**changes | {"data.cache": False}), tmp_path / "whole")
    parts = train(tiny(**changes), tmp_path / "parts", stop_at=5)
    assert len(tokenised) == 4
    shutil.rmtree(tmp_path / "cache")
    train(tiny(**changes), parts, resume=parts, stop_at=8)
    assert len(tokenised) == 6
    train(tiny(**changes), parts, resume=parts)
    assert len(tokenised) == 6
    assert_equal_runs(whole, parts)
