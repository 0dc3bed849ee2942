"""Whatever decides the tokens of a file changes the key that they are found by."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from runner.data import token_cache_key
from runner.data.formats import ColumnNames

READINGS = {
    "format": "chat",
    "mask_prompt": False,
    "max_length": 61,
    "on_too_long": "drop",
    "chat_template": False,
    "keys": ColumnNames(messages="turns"),
}


def test_every_setting_of_a_reading_is_varied(reading):
    assert set(READINGS) == set(type(reading()).__dataclass_fields__)


@pytest.mark.parametrize("name", READINGS)
def test_a_setting_changes_the_key(name, reading):
    one, other = reading(max_length=50), replace(reading(max_length=50), **{name: READINGS[name]})
    assert token_cache_key.cache_key("a", "b", one) != token_cache_key.cache_key("a", "b", other)
    assert token_cache_key.cache_key("a", "b", one) == token_cache_key.cache_key(
        "a", "b", replace(other, **{name: getattr(one, name)})
    )


def test_content_and_tokenizer_change_the_key(reading):
    keys = {token_cache_key.cache_key(*parts, reading()) for parts in (("a", "b"), ("a", "c"), ("c", "b"), ("b", "a"))}
    assert len(keys) == 4


def _added(made):
    made._tokenizer.add_tokens(["zebra"])


def _special(made):
    made._tokenizer.bos_token = "<|im_start|>"


def _normalized(made):
    from tokenizers import normalizers

    made._tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _split(made):
    made._tokenizer.split_special_tokens = True


def _template(made):
    made._tokenizer.chat_template += " "


def _eos(made):
    made._tokenizer.eos_token = "<|endoftext|>"


def _another_class(made):
    made._tokenizer.__class__ = type("Another", (type(made._tokenizer),), {})


@pytest.mark.parametrize("change", [_added, _special, _normalized, _split, _template, _eos, _another_class])
def test_what_decides_a_tokenizer_changes_its_identity(change, make_tokenizer):
    import copy

    made, same = copy.deepcopy(make_tokenizer()), copy.deepcopy(make_tokenizer())
    before = token_cache_key.tokenizer_identity(made)
    assert token_cache_key.tokenizer_identity(same) == before
    change(made)
    assert token_cache_key.tokenizer_identity(made) != before


@pytest.mark.parametrize("package", token_cache_key.PACKAGES)
def test_another_version_of_a_package_changes_the_key(package, monkeypatch, reading):
    before = token_cache_key.cache_key("a", "b", reading())
    own = token_cache_key.version
    monkeypatch.setattr(token_cache_key, "version", lambda name: "99" if name == package else own(name))
    token_cache_key.code_identity.cache_clear()
    try:
        assert token_cache_key.cache_key("a", "b", reading()) != before
    finally:
        monkeypatch.undo()
        token_cache_key.code_identity.cache_clear()


def test_another_text_of_our_code_changes_the_key(monkeypatch, reading, tmp_path):
    before = token_cache_key.cache_key("a", "b", reading())
    here = Path(token_cache_key.__file__).parent
    for name in token_cache_key.CODE:
        (tmp_path / name).write_bytes((here / name).read_bytes())
    (tmp_path / "chat_spans.py").write_bytes((here / "chat_spans.py").read_bytes() + b"\n")
    monkeypatch.setattr(token_cache_key, "__file__", str(tmp_path / "cache_key.py"))
    token_cache_key.code_identity.cache_clear()
    try:
        assert token_cache_key.cache_key("a", "b", reading()) != before
    finally:
        monkeypatch.undo()
        token_cache_key.code_identity.cache_clear()


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}",
        "{{ now() }}",
        "{{ datetime_now ('%Y') }}",
        "{{ ['a', 'b'] | random }}",
        "{{ [['a']] | map('random') | first }}",
        "{{ lipsum(n=1) }}",
    ],
)
def test_a_template_of_the_day_is_not_kept_and_that_is_said_once(
    template, load, make_tokenizer, chat_templates, tmp_path
):
    made = make_tokenizer(chat_templates["CHATML"] + "{% if false %}" + template + "{% endif %}")
    data = load(tokenizer=made)
    assert [line for line in data.notes if "tokens are not kept on disk: the model's chat template uses" in line]
    assert len(data.notes) == 1
    assert not (tmp_path / "cache").exists()


def test_words_about_time_are_no_program_and_text_needs_no_template(load, make_tokenizer, chat_templates, write_rows):
    chatml = chat_templates["CHATML"]
    assert not load(tokenizer=make_tokenizer("{# a random date, now #}" + chatml)).notes
    write_rows("text/train.jsonl", {"text": "Paris is the capital"})
    dated = make_tokenizer("{{ strftime_now('%Y') }}")
    folder = write_rows("text/valid.jsonl", {"text": "Paris is"}).parent
    assert not load(path=folder, tokenizer=dated, format="text").notes


def test_a_tokenizer_that_is_code_is_not_kept(load, make_tokenizer, tmp_path):
    made = make_tokenizer()
    made._tokenizer.__class__ = type("Own", (type(made._tokenizer),), {"__module__": "transformers_modules.theirs"})
    assert "program of its own" in load(tokenizer=made).notes[0]
    assert not (tmp_path / "cache").exists()


def test_edited_data_are_tokenised_again(load, folder, tokenised, rewrite):
    before = load()
    rewrite(folder / "train.jsonl", b"what is 3?", b"what is 4?")
    after = load()
    assert tokenised[2:] == ["train.jsonl"]
    assert before.train.fingerprint != after.train.fingerprint


@pytest.fixture
def hashed(monkeypatch):
    """The files that were read for their hash, all of them being large."""
    names = []
    own = hashlib.file_digest

    def file_digest(file, name):
        names.append(Path(file.name).name)
        return own(file, name)

    monkeypatch.setattr(token_cache_key, "ALWAYS_READ", 0)
    monkeypatch.setattr(token_cache_key.hashlib, "file_digest", file_digest)
    return names


def test_a_large_file_is_hashed_once(load, hashed, monkeypatch, tokenised):
    monkeypatch.setattr(token_cache_key, "SETTLED", 0.0)
    load()
    assert hashed == ["train.jsonl", "valid.jsonl"]
    load()
    assert len(hashed) == 2
    assert len(tokenised) == 2


def test_a_file_of_just_now_is_hashed_until_it_is_settled(load, hashed, folder):
    load()
    load()
    assert hashed == ["train.jsonl", "valid.jsonl"] * 2
    assert not list((folder.parent / "cache").glob("files/*"))


def test_a_file_that_settles_while_its_rows_are_tokenised_is_noted_then(load, hashed, monkeypatch, tokenised):
    now = iter([False, True, True] * 2)
    monkeypatch.setattr(token_cache_key, "_is_settled", lambda _: next(now, True))
    load()
    assert hashed == ["train.jsonl"] * 2 + ["valid.jsonl"] * 2
    load()
    assert len(hashed) == 4
    assert len(tokenised) == 2


def test_an_edit_that_keeps_size_and_time_is_noticed(load, hashed, folder, monkeypatch, tokenised, rewrite):
    monkeypatch.setattr(token_cache_key, "SETTLED", 0.0)
    file = folder / "train.jsonl"
    before, stamp = load(), file.stat()
    rewrite(file, b"what is 3?", b"what is 4?")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    after = load()
    assert tokenised[2:] == ["train.jsonl"]
    assert before.train.fingerprint != after.train.fingerprint


def test_a_file_that_takes_the_place_of_another_is_noticed(
    load, hashed, folder, monkeypatch, tokenised, tmp_path, rewrite
):
    monkeypatch.setattr(token_cache_key, "SETTLED", 0.0)
    file = folder / "train.jsonl"
    load()
    stamp = file.stat()
    shutil.copy(file, tmp_path / "other")
    rewrite(tmp_path / "other", b"what is 3?", b"what is 4?")
    os.utime(tmp_path / "other", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    os.replace(tmp_path / "other", file)
    load()
    assert tokenised[2:] == ["train.jsonl"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data.replace(b'"size"', b'"seize"'), lambda _: b""]
)
def test_a_damaged_note_of_a_hash_is_passed_over(damage, load, hashed, folder, monkeypatch):
    monkeypatch.setattr(token_cache_key, "SETTLED", 0.0)
    load()
    for note in (folder.parent / "cache" / "files").iterdir():
        note.write_bytes(damage(note.read_bytes()))
    assert not load().notes
    assert len(hashed) == 4
