"""Labels: what is a name, a tag and a note, and how they are typed."""

from __future__ import annotations

import pytest

from runner.common.errors import ConfigError
from runner.config import environment, serialize
from runner.config.labels import Labels, quote, split_tags


@pytest.mark.parametrize(
    ("typed", "tags"),
    [("sql", ["sql"]), ("a,b", ["a", "b"]), ("[a, b]", ["a", "b"]), ("['a',b]", ["a", "b"]), ("", []), ],
)  # fmt: skip
def test_tags_are_typed_as_a_word_words_or_a_list(typed, tags):
    assert split_tags(typed) == tags


@pytest.mark.parametrize(
    ("key", "typed", "quoted"),
    [
        ("name", "my first, run", "'my first, run'"),
        ("name", "8", "'8'"),
        ("name", "null", "null"),
        ("note", "it's: a=b, [c]", "'it\\'s: a=b, [c]'"),
        ("name", "r${lora.rank}", "r${lora.rank}"),
        ("tags", "a,b", "[a,b]"),
        ("tags", "null", "[]"),
        ("tags", "1", "['1']"),
    ],
)
def test_a_label_is_quoted_for_hydras_grammar(key, typed, quoted):
    assert quote(key, typed) == quoted


def test_an_invalid_label_is_refused_with_what_it_has_to_be(tiny):
    with pytest.raises(ConfigError, match="a tag is one word"):
        quote("tags", "two words")
    for name, value, reason in (
        ("name", "", "one line"),
        ("name", "a\nb", "one line"),
        ("name", "x" * 101, "100 characters"),
        ("tags", ["a b"], "one word"),
        ("tags", [str(i) for i in range(101)], "too many"),
        ("note", "x" * 10_001, "10,000"),
    ):
        with pytest.raises(ConfigError, match=reason):
            tiny(**{name: value})


def test_a_config_is_stored_without_labels(tiny):
    stored = serialize.to_dict(tiny(name="first", tags=["a", "b", "a"], note="why"))
    assert Labels.take(stored) == Labels("first", ("a", "b"), "why")
    assert not stored.keys() & {"name", "tags", "note"}


def test_what_jobs_share_and_what_they_have_beside_that():
    jobs = [Labels("s", ("all", "four"), "n"), Labels("s", ("all", "eight"), "n")]
    shared = Labels.shared(jobs)
    assert shared == Labels("s", ("all",), "n")
    assert [job.without(shared) for job in jobs] == [Labels(tags=("four",)), Labels(tags=("eight",))]
    assert shared.tagged(["new", "all"], ["new"]) == ("all",)


def test_a_tag_from_the_environment_is_stored_as_it_was_written():
    stored = {"name": "secret-run", "tags": ["a", "secret"]}
    environment.keep_references(stored, {"name": "${oc.env:X}-run", "tags": ["a", "${oc.env:X}"]})
    assert Labels.take(stored) == Labels("${oc.env:X}-run", ("a", "${oc.env:X}"))
