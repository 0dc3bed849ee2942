"""Everything that decides the tokens of a file changes their cache key."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from runner.config.schema import KeysConfig
from runner.data import token_cache_key
from runner.data.chat_template import TemplateOptions

CHANGED_OPTIONS = {
    "answers": "pairs",
    "format": "chat",
    "mask_prompt": False,
    "max_length": 61,
    "on_too_long": "drop",
    "chat_template": False,
    "system_prompt": "Be brief.",
    "keys": KeysConfig(messages="turns"),
    "template": TemplateOptions(args={"enable_thinking": False}),
}


def test_every_encode_option_is_tested(make_options):
    assert set(CHANGED_OPTIONS) == set(type(make_options()).__dataclass_fields__)


@pytest.mark.parametrize("name", CHANGED_OPTIONS)
def test_every_encode_option_changes_the_key(name, make_options):
    options = make_options(max_length=50)
    changed = replace(options, **{name: CHANGED_OPTIONS[name]})
    restored = replace(changed, **{name: getattr(options, name)})
    assert token_cache_key.cache_key("a", "b", options) != token_cache_key.cache_key("a", "b", changed)
    assert token_cache_key.cache_key("a", "b", options) == token_cache_key.cache_key("a", "b", restored)


def test_content_and_tokenizer_change_the_key(make_options):
    keys = {
        token_cache_key.cache_key(*parts, make_options()) for parts in (("a", "b"), ("a", "c"), ("c", "b"), ("b", "a"))
    }
    assert len(keys) == 4


def _added_token(tokenizer):
    tokenizer._tokenizer.add_tokens(["zebra"])


def _bos_token(tokenizer):
    tokenizer._tokenizer.bos_token = "<|im_start|>"


def _normalizer(tokenizer):
    from tokenizers import normalizers

    tokenizer._tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _split_special_tokens(tokenizer):
    tokenizer._tokenizer.split_special_tokens = True


def _chat_template(tokenizer):
    tokenizer._tokenizer.chat_template += " "


def _eos_token(tokenizer):
    tokenizer._tokenizer.eos_token = "<|endoftext|>"


def _class(tokenizer):
    tokenizer._tokenizer.__class__ = type("Another", (type(tokenizer._tokenizer),), {})


@pytest.mark.parametrize(
    "change", [_added_token, _bos_token, _normalizer, _split_special_tokens, _chat_template, _eos_token, _class]
)
def test_every_property_of_a_tokenizer_changes_its_identity(change, make_tokenizer):
    import copy

    tokenizer, same = copy.deepcopy(make_tokenizer()), copy.deepcopy(make_tokenizer())
    before = token_cache_key.tokenizer_identity(tokenizer)
    assert token_cache_key.tokenizer_identity(same) == before
    change(tokenizer)
    assert token_cache_key.tokenizer_identity(tokenizer) != before


@pytest.mark.parametrize("package", token_cache_key.PACKAGES)
def test_another_version_of_a_package_changes_the_key(package, monkeypatch, make_options):
    before = token_cache_key.cache_key("a", "b", make_options())
    version = token_cache_key.version
    monkeypatch.setattr(token_cache_key, "version", lambda name: "99" if name == package else version(name))
    token_cache_key.code_identity.cache_clear()
    try:
        assert token_cache_key.cache_key("a", "b", make_options()) != before
    finally:
        monkeypatch.undo()
        token_cache_key.code_identity.cache_clear()


def test_a_change_of_the_code_changes_the_key(monkeypatch, make_options, tmp_path):
    before = token_cache_key.cache_key("a", "b", make_options())
    package = Path(token_cache_key.__file__).parent
    for name in token_cache_key.CODE_FILES:
        (tmp_path / name).write_bytes((package / name).read_bytes())
    (tmp_path / "chat_spans.py").write_bytes((package / "chat_spans.py").read_bytes() + b"\n")
    monkeypatch.setattr(token_cache_key, "__file__", str(tmp_path / "token_cache_key.py"))
    token_cache_key.code_identity.cache_clear()
    try:
        assert token_cache_key.cache_key("a", "b", make_options()) != before
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
def test_tokens_of_a_nondeterministic_template_are_not_cached_which_is_reported_once(
    template, load, make_tokenizer, chat_templates, tmp_path
):
    tokenizer = make_tokenizer(chat_templates["CHATML"] + "{% if false %}" + template + "{% endif %}")
    data = load(tokenizer=tokenizer)
    assert [line for line in data.notes if "tokens are not cached: the model's chat template uses" in line]
    assert len(data.notes) == 1
    assert not (tmp_path / "cache").exists()


def test_template_text_about_time_is_cached_and_plain_text_uses_no_template(
    load, make_tokenizer, chat_templates, write_rows
):
    chatml = chat_templates["CHATML"]
    assert not load(tokenizer=make_tokenizer("{# a random date, now #}" + chatml)).notes
    write_rows("text/train.jsonl", {"text": "Paris is the capital"})
    dated = make_tokenizer("{{ strftime_now('%Y') }}")
    folder = write_rows("text/valid.jsonl", {"text": "Paris is"}).parent
    assert not load(path=folder, tokenizer=dated, format="text").notes


def test_tokens_of_a_custom_tokenizer_are_not_cached(load, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.__class__ = type(
        "Custom", (type(tokenizer._tokenizer),), {"__module__": "transformers_modules.theirs"}
    )
    assert "custom code" in load(tokenizer=tokenizer).notes[0]
    assert not (tmp_path / "cache").exists()


def test_edited_data_is_tokenized_again(load, folder, tokenized_files, replace_bytes):
    before = load()
    replace_bytes(folder / "train.jsonl", b"what is 3?", b"what is 4?")
    after = load()
    assert tokenized_files[2:] == ["train.jsonl"]
    assert before.train.fingerprint != after.train.fingerprint


@pytest.fixture
def hashed_files(monkeypatch):
    """The names of the files that were hashed_files, as a growing list; all of them count as large."""
    names = []
    file_digest = hashlib.file_digest

    def recording(file, algorithm):
        names.append(Path(file.name).name)
        return file_digest(file, algorithm)

    monkeypatch.setattr(token_cache_key, "ALWAYS_HASHED_BYTES", 0)
    monkeypatch.setattr(token_cache_key.hashlib, "file_digest", recording)
    return names


def test_a_large_file_is_hashed_once(load, hashed_files, monkeypatch, tokenized_files):
    monkeypatch.setattr(token_cache_key, "SETTLED_SECONDS", 0.0)
    load()
    assert hashed_files == ["train.jsonl", "valid.jsonl"]
    load()
    assert len(hashed_files) == 2
    assert len(tokenized_files) == 2


def test_a_recently_changed_file_is_hashed_at_every_start(load, hashed_files, folder):
    load()
    load()
    assert hashed_files == ["train.jsonl", "valid.jsonl"] * 2
    assert not list((folder.parent / "cache").glob("files/*"))


def test_the_hash_of_a_file_that_settles_while_it_is_tokenized_is_stored(
    load, hashed_files, monkeypatch, tokenized_files
):
    settled = iter([False, True, True] * 2)
    monkeypatch.setattr(token_cache_key, "_is_settled", lambda _: next(settled, True))
    load()
    assert hashed_files == ["train.jsonl"] * 2 + ["valid.jsonl"] * 2
    load()
    assert len(hashed_files) == 4
    assert len(tokenized_files) == 2


def test_an_edit_that_keeps_size_and_time_is_noticed(
    load, hashed_files, folder, monkeypatch, tokenized_files, replace_bytes
):
    monkeypatch.setattr(token_cache_key, "SETTLED_SECONDS", 0.0)
    file = folder / "train.jsonl"
    before, stamp = load(), file.stat()
    replace_bytes(file, b"what is 3?", b"what is 4?")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    after = load()
    assert tokenized_files[2:] == ["train.jsonl"]
    assert before.train.fingerprint != after.train.fingerprint


def test_a_file_that_replaces_another_is_noticed(
    load, hashed_files, folder, monkeypatch, tokenized_files, tmp_path, replace_bytes
):
    monkeypatch.setattr(token_cache_key, "SETTLED_SECONDS", 0.0)
    file = folder / "train.jsonl"
    load()
    stamp = file.stat()
    shutil.copy(file, tmp_path / "other")
    replace_bytes(tmp_path / "other", b"what is 3?", b"what is 4?")
    os.utime(tmp_path / "other", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    os.replace(tmp_path / "other", file)
    load()
    assert tokenized_files[2:] == ["train.jsonl"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data.replace(b'"size"', b'"seize"'), lambda _: b""]
)
def test_a_damaged_stored_hash_is_ignored(damage, load, hashed_files, folder, monkeypatch):
    monkeypatch.setattr(token_cache_key, "SETTLED_SECONDS", 0.0)
    load()
    for entry in (folder.parent / "cache" / "files").iterdir():
        entry.write_bytes(damage(entry.read_bytes()))
    assert not load().notes
    assert len(hashed_files) == 4


def test_a_template_that_writes_the_date_is_cached_under_the_date_of_the_run(
    make_tokenizer, chat_templates, make_options
):
    dated = make_tokenizer("{{ strftime_now('%d %b %Y') }}" + chat_templates["CHATML"])
    plain = make_tokenizer(chat_templates["CHATML"])
    today, tomorrow = (make_options(template_date=f"2026-11-{day}") for day in (29, 30))
    assert "strftime_now" in token_cache_key.uncacheable_reason(dated, make_options())
    assert token_cache_key.uncacheable_reason(dated, today) is None
    for tokenizer, differ in ((dated, True), (plain, False)):
        identity = token_cache_key.tokenizer_identity(tokenizer)
        keys = {token_cache_key.cache_key("a", identity, options) for options in (today, tomorrow)}
        assert (len(keys) == 2) is differ
