"""Reading JSONL files and locating data sets; every unusable line is reported with file, number and reason."""

from __future__ import annotations

import codecs
import os

import pytest

from runner.common.errors import DataError
from runner.data.jsonl import read_jsonl
from runner.data.row_errors import RowErrors
from runner.data.source import find_dataset, find_split_files
from runner.data.tokenize import load_dataset


@pytest.fixture
def file(tmp_path):
    def write(content: bytes):
        path = tmp_path / "train.jsonl"
        path.write_bytes(content)
        return path

    return write


def values(path):
    return [(row.line, row.value) for row in read_jsonl(path)]


def test_rows_are_read_in_order_with_their_line_numbers(file):
    path = file(b'{"text": "a"}\n\n   \n{"text": "b"}')
    assert values(path) == [(1, {"text": "a"}), (4, {"text": "b"})]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_and_both_line_endings_are_accepted(end, file):
    path = file(codecs.BOM_UTF8 + end.join([b'{"text": "\xc3\xa4"}', b"", b'{"text": "b"}', b""]))
    assert values(path) == [(1, {"text": "ä"}), (3, {"text": "b"})]


def test_a_byte_order_mark_on_a_later_line_is_an_error(file):
    with pytest.raises(DataError, match=r"train\.jsonl:2: not JSON \(column 1"):
        values(file(b'{"a": 1}\n' + codecs.BOM_UTF8 + b'{"a": 1}\n'))


def test_a_unicode_line_separator_inside_a_string_does_not_end_the_line(file):
    assert values(file('{"text": "a\u2028b\x85c"}\n'.encode())) == [(1, {"text": "a\u2028b\x85c"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON (column 13: "),
        (b"{\"text\": 'a'}", "not JSON (column 10: "),
        (b"{} {}", "not JSON (column 4: Extra data)"),
        (b'[{"text": "a"}]', "a list, not an object; expected one JSON object per line"),
        (b'"text"', "a string, not an object"),
        (b"3.5", "a number, not an object"),
        (b"null", "null, not an object"),
        (b"true", "a boolean, not an object"),
        (b'{"text": "a\xe4"}', "not UTF-8 (byte 12: 0xe4)"),
        (b"[" * 200_000, "invalid JSON (nested too deeply)"),
        (b'{"text": ' + b"9" * 5000 + b"}", "invalid JSON (Exceeds the limit"),
    ],
)
def test_a_line_that_is_not_a_json_object_is_reported_with_the_reason(line, reason, file):
    path = file(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        values(path)
    assert f"{path}:2: {reason}" in str(caught.value)


def test_the_first_ten_row_errors_are_listed_and_the_others_counted(file):
    path = file(b'{"text": "a"}\n' * 2 + b"x\n" * 37)
    with pytest.raises(DataError) as caught:
        values(path)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("37 rows")
    assert [line.split(":")[1] for line in lines[1:11]] == [str(number) for number in range(3, 13)]
    assert lines[11:] == ["  and 27 more"]


def test_good_rows_are_read_where_the_caller_collects_the_errors(file):
    errors = RowErrors()
    path = file(b'x\n{"text": "a"}\ny\n')
    assert [row.line for row in read_jsonl(path, errors)] == [2]
    assert errors.count == 2


@pytest.mark.parametrize("content", [b"", b"\n \n", codecs.BOM_UTF8])
def test_an_empty_file_is_refused_with_what_is_expected(content, file):
    with pytest.raises(DataError, match=r"is empty. Expected one JSON object per line"):
        values(file(content))


def test_a_utf_16_file_is_refused_as_such(file):
    with pytest.raises(DataError, match="UTF-16"):
        values(file('{"text": "a"}\n'.encode("utf-16")))


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        values(tmp_path / "train.jsonl")


def test_an_existing_folder_comes_before_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_dataset("org/name").resolve() == tmp_path / "org" / "name"


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my data").mkdir()
    assert find_dataset("~/my data") == tmp_path / "my data"


def test_a_missing_folder_is_refused_with_suggestions(tmp_path):
    (tmp_path / "my_data").mkdir()
    with pytest.raises(DataError, match=r"Did you mean 'my_data'\?.*train\.jsonl.*builtin:"):
        find_dataset(str(tmp_path / "mydata"))


@pytest.mark.parametrize("path", ["", "/nowhere/at/all", "a/b/c", "../gone/", "-x/y"])
def test_a_path_that_is_neither_a_folder_nor_a_hub_id_is_refused(path):
    with pytest.raises(DataError, match="There is no file or folder"):
        find_dataset(path)


def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path):
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(DataError, match=r"rows\.txt is no data file: its name must end with \.jsonl"):
        find_dataset(str(tmp_path / "rows.txt"))


def test_built_in_sets_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("runner.data.source.BUILTIN_SETS", tmp_path)
    (tmp_path / "arithmetic").mkdir()
    (tmp_path / "__pycache__").mkdir()
    assert find_dataset("builtin:arithmetic") == tmp_path / "arithmetic"
    with pytest.raises(DataError, match=r"Did you mean 'arithmetic'\? Built-in data sets: arithmetic\."):
        find_dataset("builtin:aritmetic")
    with pytest.raises(DataError, match="no built-in"):
        find_dataset("builtin:../sets")


def test_a_folder_without_split_files_is_refused_with_its_content(tmp_path):
    (tmp_path / "training.jsonl").write_text("{}")
    (tmp_path / "old").mkdir()
    with pytest.raises(DataError, match=r"It contains: old/, training\.jsonl\. The file must be named train"):
        find_split_files(tmp_path)
    with pytest.raises(DataError, match="It is empty"):
        find_split_files(tmp_path / "old")


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev", "eval"])
def test_common_names_of_the_validation_file_are_accepted(name, write_rows, tmp_path):
    path = write_rows(f"{name}.jsonl", {"text": "a"})
    assert find_split_files(tmp_path) == {"valid": (path,)}


def test_of_two_names_of_the_validation_file_one_has_to_be_chosen(write_rows, tmp_path):
    write_rows("dev.jsonl", {"text": "a"})
    path = write_rows("valid.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=r"data\.splits\.valid=valid\.jsonl"):
        find_split_files(tmp_path)
    assert find_split_files(tmp_path, {"valid": "valid.jsonl"}) == {"valid": (path,)}


def test_a_missing_training_file_is_refused_with_the_content_of_the_folder(
    write_rows, tmp_path, tokenizer, make_options
):
    write_rows("valid.jsonl", {"text": "a b c"})
    with pytest.raises(DataError, match=r"has no train\.jsonl.*It contains: valid\.jsonl"):
        load_dataset(str(tmp_path), tokenizer, make_options())
    data = load_dataset(str(tmp_path), tokenizer, make_options(), splits=("valid",))
    assert (len(data.train), len(data.valid)) == (0, 1)
