"""Every kind of file gives the rows of the same JSON Lines, with the number of each row; mixes and cut-off splits."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from runner.common.disk_cache import DiskCache
from runner.common.errors import DataError
from runner.config.schema import DataConfig, SplitsConfig
from runner.data import holdout
from runner.data.formats import EncodeOptions
from runner.data.mixture import Mixture
from runner.data.order import BatchOrder, DataPosition
from runner.data.readers import read_rows
from runner.data.source import find_sources
from runner.data.tokenize import load_dataset, load_sources

ROWS = [{"prompt": f'what is {n}, "quoted"\nand ä?', "completion": f"the {n * 'a'}"} for n in range(1, 30)]


def write_file(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    return path


@pytest.fixture
def load_config(tokenizer):
    def load(cache=None, splits=("train", "valid", "test"), **settings):
        config = DataConfig(**settings)
        options = EncodeOptions.from_config(config)
        sources = find_sources(config)
        return load_sources(sources, tokenizer, options, splits, cache, valid_fraction=config.valid_fraction)

    return load


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_tokens(suffix, tmp_path, load_config):
    expected = load_config(path=str(write_file(tmp_path / "reference" / "train.jsonl", ROWS)))
    found = load_config(path=str(write_file(tmp_path / f"rows{suffix}", ROWS)))
    assert found.train.fingerprint == expected.train.fingerprint
    assert found.locate("train", 4) == (tmp_path / f"rows{suffix}", 5)
    assert found.first_rows("train", 2) == ROWS[:2]


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_an_unusable_row_is_named_by_its_number(suffix, tmp_path, load_config):
    rows = [*ROWS[:5], {"prompt": "p", "completion": ""}, *ROWS[5:]]
    with pytest.raises(DataError, match=rf"rows\{suffix} row 6: 'completion' is empty"):
        load_config(path=str(write_file(tmp_path / f"rows{suffix}", rows)))


def test_a_json_array_is_read_without_being_in_memory(tmp_path):
    path = write_file(tmp_path / "rows.json", [{"text": "x" * 1000, "n": n} for n in range(20_000)])
    tracemalloc.start()
    numbers = [row.value["n"] for row in read_rows(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == list(range(20_000))
    assert peak < 12e6 < path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", '[\n  {"text": "a"},\n  {"text": }\n]', r"a\.json:3: the JSON array is broken"),
        ("a.json", '[{"text": "a"}', r"a\.json:1: the JSON array is broken"),
        ("a.json", '[{"text": "a"}] x', r"more after the end of its JSON array"),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json row 2: it is not an object"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', r"a\.json:1: the JSON array is broken \(Expecting ',' or '\]'"),
        ("a.json", '[{"text": "a"},,,{"text": "b"}]', r"a\.json:1: the JSON array is broken"),
        ("a.json", '[{"text": "a"},\n]', r"a\.json:2: the JSON array is broken"),
        ("a.json", '[{"text": "a"}, {"text": "b", "text": "c"}]', r"a\.json row 2: the key 'text' occurs twice"),
        ("a.jsonl", '{"m": [{"role": "a", "role": "b"}]}', r"a\.jsonl:1: the key 'role' occurs twice"),
        ("a.json", '{\n  "data": [\n {"text": "a"}\n]}', r"begins with an object over several lines.*jq -c"),
        ("a.jsonl", '{"data": [\n {"text": "a"}\n]}', r"begins with an object over several lines"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "text\n", r"a\.csv is empty"),
        ("a.csv", "text,b\nx,y\nz\n", r"a\.csv row 2: 1 values, but the header has 2 columns"),
        ("a.csv", 'text\n"x', r"a\.csv:2: the CSV cannot be read"),
        ("a.csv", "prompt,completion,completion\na,b,c\n", r"a\.csv has several columns named 'completion'"),
        ("a.parquet", "PAR1", r"a\.parquet cannot be read as Parquet"),
    ],
)
def test_a_broken_file_is_refused_with_the_place(name, content, says, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says):
        list(read_rows(tmp_path / name))


def test_nulls_of_parquet_are_fields_that_the_row_does_not_have(tmp_path):
    rows = [
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "a"}]}], "extra": None},
        {"messages": [{"role": "user", "content": "b", "tool_calls": None}], "extra": "c"},
    ]
    found = [row.value for row in read_rows(write_file(tmp_path / "a.parquet", rows))]
    assert found[0] == {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "a"}]}]}
    assert found[1] == {"messages": [{"role": "user", "content": "b"}], "extra": "c"}


@pytest.mark.parametrize("present", [["00000-of-00003", "00002-of-00003"], ["00000-of-00001", "00000-of-00002"]])
def test_a_split_of_which_shards_are_missing_is_refused(present, tmp_path, load_config):
    for shard in present:
        write_file(tmp_path / f"train-{shard}.jsonl", ROWS[:2])
    with pytest.raises(DataError, match="the files train-…-of-… are 2 and not the"):
        load_config(path=str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "train.csv"),
        ("train.jsonl", "train-00000-of-00001.jsonl"),
        ("train-00000-of-00001.parquet", "train.csv"),
        ("train.json", "valid.jsonl", "dev.jsonl"),
    ],
)
def test_of_two_files_for_a_split_none_is_ignored(names, tmp_path, load_config):
    files = [write_file(tmp_path / name, ROWS[number:]) for number, name in enumerate(names)]
    first, second = names[-2:]
    with pytest.raises(DataError, match=f"has {first} and {second}, and only one of them can be the split") as refused:
        load_config(path=str(tmp_path))
    split, _, name = str(refused.value).rpartition("data.splits.")[2].partition("=")
    files[-1].unlink()
    data = load_config(path=str(tmp_path))
    assert data.parts[split][0].file.name == name


def test_a_file_of_several_for_a_split_is_chosen_by_its_whole_name(tmp_path, load_config):
    for number, name in enumerate(("train.jsonl", "train.csv")):
        write_file(tmp_path / name, ROWS[number:])
    sources = find_sources(DataConfig(path=str(tmp_path), splits=SplitsConfig(train="train.csv")))
    assert [file.name for file in sources[0].find_files()["train"]] == ["train.csv"]


def test_shards_are_read_in_order_with_the_row_of_each_file(tmp_path, load_config):
    folder = tmp_path / "data"
    write_file(folder / "train-00001-of-00002.parquet", ROWS[10:])
    write_file(folder / "train-00000-of-00002.parquet", ROWS[:10])
    write_file(folder / "validation-00000-of-00001.parquet", ROWS[:3])
    data = load_config(path=str(tmp_path))
    whole = load_config(path=str(write_file(tmp_path / "whole.jsonl", ROWS)))
    assert data.train.fingerprint == whole.train.fingerprint
    assert data.locate("train", 12) == (folder / "train-00001-of-00002.parquet", 3)
    assert len(data.valid) == 3


def test_other_names_of_splits_and_a_subfolder_are_found(tmp_path, load_config):
    write_file(tmp_path / "sub" / "train_sft.jsonl", ROWS)
    write_file(tmp_path / "sub" / "held_out.csv", ROWS[:4])
    config = DataConfig(path=str(tmp_path), config="sub")
    config.splits.train, config.splits.valid = "train_sft", "held_out"
    files = find_sources(config)[0].find_files()
    assert {split: [file.name for file in found] for split, found in files.items()} == {
        "train": ["train_sft.jsonl"],
        "valid": ["held_out.csv"],
    }
    config.splits.test = "gone"
    with pytest.raises(DataError, match=r"has no file 'gone' \(data\.splits\)"):
        find_sources(config)[0].find_files()


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_cached_tokens_are_used_until_the_file_changes(suffix, tmp_path, load_config, tokenized_files, monkeypatch):
    monkeypatch.setattr("runner.data.token_cache.MIN_FILE_BYTES", 1)
    path, cache = write_file(tmp_path / f"train{suffix}", ROWS), DiskCache(tmp_path / "cache", 10**9)
    first = load_config(cache, path=str(path)).train
    assert load_config(cache, path=str(path)).train.fingerprint == first.fingerprint
    assert tokenized_files == [path.name]
    write_file(path, ROWS[:-1])
    assert len(load_config(cache, path=str(path)).train) == len(ROWS) - 1
    assert tokenized_files == [path.name] * 2


# A validation split that is cut off


def split_of(data):
    return {split: [row["prompt"] for row in data.first_rows(split, -1)] for split in ("train", "valid")}


def test_validation_rows_are_cut_off_and_adding_rows_moves_none(tmp_path, load_config):
    rows = [{"prompt": str(n), "completion": "x"} for n in range(300)]
    path = write_file(tmp_path / "a.jsonl", rows)
    data = load_config(path=str(path), valid_fraction=0.1)
    before = split_of(data)
    assert sorted(before["train"] + before["valid"], key=int) == [str(n) for n in range(300)]
    assert (len(data.train), len(data.valid)) == (len(before["train"]), len(before["valid"]))
    assert 15 <= len(data.valid) <= 50
    assert "0.1 of its training rows are cut off" in data.notes[0]
    more = [{"prompt": str(n), "completion": "x"} for n in range(300, 400)]
    after = split_of(load_config(path=str(write_file(path, [*more, *rows, *rows])), valid_fraction=0.1))
    assert set(before["valid"]) <= set(after["valid"])
    assert not set(after["valid"]) & set(after["train"])
    assert not set(before["train"]) & set(after["valid"])


def test_at_least_one_row_is_cut_off_and_an_own_split_is_left_alone(tmp_path, load_config):
    write_file(tmp_path / "a" / "train.jsonl", ROWS)
    data = load_config(path=str(tmp_path / "a"), valid_fraction=1e-9)
    assert (len(data.train), len(data.valid)) == (len(ROWS) - 1, 1)
    only = load_config(path=str(tmp_path / "a"), valid_fraction=1e-9, splits=("valid",))
    assert only.valid.fingerprint == data.valid.fingerprint
    write_file(tmp_path / "a" / "valid.jsonl", ROWS[:2])
    data = load_config(path=str(tmp_path / "a"), valid_fraction=0.5)
    assert (len(data.train), len(data.valid)) == (len(ROWS), 2)


def test_one_row_cannot_be_cut(tmp_path, load_config):
    with pytest.raises(DataError, match="too few different rows"):
        load_config(path=str(write_file(tmp_path / "a.jsonl", ROWS[:1])), valid_fraction=0.5)


def test_the_side_of_a_row_is_the_same_everywhere():
    assert holdout.row_hash({"a": "ä", "b": [1, 2.5, None]}) == holdout.row_hash({"b": [1, 2.5, None], "a": "ä"})
    assert holdout.row_hash({"text": "a"}) == 10700809763153729427


# Mixes


def epoch_rows(order, epoch):
    batches, _ = order.next_batches(DataPosition(epoch, 0), order.batches_per_epoch)
    return [int(row) for batch in batches for row in batch]


def test_an_epoch_has_each_sources_share_and_every_row_comes_equally_often():
    mixture = Mixture.from_weights([100, 10, 7], [1, 2, 1])
    assert mixture.counts == (29, 59, 29)
    assert sum(mixture.counts) == 117
    order = BatchOrder(np.arange(117) + 1, 4, 3, 1, mixture)
    seen = Counter()
    for epoch in range(40):
        rows = epoch_rows(order, epoch)
        assert [sum(first <= row < last for row in rows) for first, last in ((0, 100), (100, 110), (110, 117))] == [
            29,
            59,
            29,
        ]
        seen.update(rows)
    for first, last in ((0, 100), (100, 110), (110, 117)):
        often = [seen[row] for row in range(first, last)]
        assert max(often) - min(often) <= 1
    fresh = BatchOrder(np.arange(117) + 1, 4, 3, 1, mixture)
    assert epoch_rows(fresh, 17) == epoch_rows(order, 17)
    assert epoch_rows(fresh, 17) != epoch_rows(BatchOrder(np.arange(117) + 1, 4, 4, 1, mixture), 17)


@pytest.mark.parametrize(("sizes", "weights"), [([30], [2.0]), ([20, 10], [None, None]), ([20, 10], [2, 1])])
def test_sources_of_which_every_row_comes_once_are_in_todays_order(sizes, weights):
    lengths = np.arange(30) % 7 + 1
    plain, mixed = BatchOrder(lengths, 4, 5, 2), BatchOrder(lengths, 4, 5, 2, Mixture.from_weights(sizes, weights))
    assert [epoch_rows(plain, epoch) for epoch in range(3)] == [epoch_rows(mixed, epoch) for epoch in range(3)]


def test_sources_of_a_mix_have_formats_and_keys_of_their_own(tmp_path, load_config):
    write_file(tmp_path / "a" / "train.jsonl", ROWS[:3])
    write_file(tmp_path / "a" / "valid.jsonl", ROWS[:1])
    write_file(tmp_path / "b.csv", [{"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}])
    mix = [
        {"path": str(tmp_path / "a"), "weight": 1},
        {"path": str(tmp_path / "b.csv"), "weight": 1, "keys": {"prompt": "question", "completion": "answer"}},
    ]
    data = load_config(path="unused", mix=mix)
    assert (len(data.train), len(data.valid)) == (5, 1)
    assert data.mixture.counts == (3, 2)
    assert data.first_rows("train", -1)[3]["prompt"] == "q"
    assert data.locate("train", 4) == (tmp_path / "b.csv", 2)
    bad = write_file(tmp_path / "b.csv", [{"question": "q", "answer": ""}])
    with pytest.raises(DataError, match=rf"{bad} row 1: 'answer' is empty"):
        load_config(path="unused", mix=mix)


def test_a_source_without_a_row_in_an_epoch_is_told(tmp_path, load_config):
    mix = [{"path": str(write_file(tmp_path / f"{n}.jsonl", ROWS)), "weight": w} for n, w in ((1, 0.001), (2, 1))]
    (note,) = load_config(mix=mix).notes
    assert note == f"data   {mix[0]['path']} has no row in an epoch: its weight is too small (data.mix)"


@pytest.mark.parametrize("field", ["images", "image", "audio", "videos"])
def test_a_row_with_other_media_than_text_is_refused(field, tmp_path, load_config):
    path = write_file(tmp_path / "a.parquet", [{**ROWS[0], field: None}, {**ROWS[1], field: [{"bytes": b"x"}]}])
    with pytest.raises(DataError, match=f"a.parquet row 2: '{field}' is not text; only text is trained on"):
        load_config(path=str(path))
    assert len(load_config(path=str(write_file(tmp_path / "b.jsonl", [{**ROWS[0], field: []}]))).train) == 1


def test_a_prompt_beyond_max_length_is_named_as_such(tmp_path, tokenizer, make_options):
    path = write_file(tmp_path / "a.jsonl", [{"prompt": "long " * 50, "completion": "x"}])
    with pytest.raises(DataError, match="1 with a prompt that alone reaches max_length 20. A larger data.max_length"):
        load_dataset(str(path), tokenizer, make_options(max_length=20))
