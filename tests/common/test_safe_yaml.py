"""Reading stored YAML: the same as PyYAML for what we write, a reason and no delay for what is hostile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import Resolver
from yaml.scanner import Scanner

from runner.common import safe_yaml


class PurePython(Reader, Scanner, Parser, Composer, SafeConstructor, Resolver):
    """yaml.SafeLoader as it is before mlx_lm.lora, once imported, changes what that reads as a number."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        for part in (Scanner, Parser, Composer, SafeConstructor, Resolver):
            part.__init__(self)


SCALARS = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | st.text(max_size=30)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "alias bomb": (BOMB, "alias"),
    "alias to itself": ("a: &a [*a]\n", "alias"),
    "merge of an alias": ("a: &a {b: 1}\nc: {<<: *a}\n", "alias"),
    "python object": ("a: !!python/object/apply:os.system ['true']\n", "tag"),
    "explicit type": ("a: !!int '7'\n", "tag"),
    "deep flow": ("a: " + "[" * 900_000, "nested"),
    "deep blocks": ("- " * 450_000, "nested"),
    "deep keys": ("? " * 450_000, "nested"),
    "number to base 60": ("a: " + "1:" * 400_000 + "1\n", "number"),
    "number of many digits": ("a: " + "1" * 5_000 + "\n", "number"),
    "impossible date": ("a: 2026-99-99\n", "month"),
    "list as a key": ("? [1, 2]\n: 3\n", "unhashable"),
    "not YAML": ("a: [1\nb: }\n", "plain YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "single document"),
}


@given(data=st.dictionaries(st.text(max_size=8), VALUES, max_size=6))
def test_what_pyyaml_writes_is_read_as_pyyaml_reads_it(data: dict[str, Any]) -> None:
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    assert safe_yaml.parse(text) == yaml.load(text, Loader=PurePython)


LINES = st.sampled_from(
    [
        "a: 1",
        "b:",
        "c: 'x",
        'd: "y',
        "e: [1,",
        "f: {g: 2",
        "h: >",
        "i: >+",
        "true: 3",
        "a: 4",
        "m: foo",
        "  n: 5",
        "  - 6",
        "- 7",
        "  o: 'p'",
        "q: 8]",
        "r: 9}",
        "s: t'",
        'u: v"',
        "  w",
        "",
        "# x",
        "---",
        "...",
        "? y",
        "z",
        "%",
    ]
)


@given(lines=st.lists(LINES, max_size=8))
def test_sections_that_are_remembered_are_read_as_in_the_whole_text(lines: list[str]) -> None:
    text = "\n".join(lines)
    try:
        expected = yaml.load(text, Loader=PurePython)
    except (yaml.YAMLError, TypeError, ValueError):
        with pytest.raises(ValueError, match="."):
            safe_yaml.parse(text)
    else:
        assert safe_yaml.parse(text) == expected


def test_what_is_remembered_is_not_shared() -> None:
    safe_yaml.parse("a:\n  b: [1]\n")["a"]["b"].append(2)
    assert safe_yaml.parse("a:\n  b: [1]\n") == {"a": {"b": [1]}}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_hostile_text_with_the_reason(name: str) -> None:
    text, reason = HOSTILE[name]
    with pytest.raises(ValueError, match=reason):
        safe_yaml.parse(text)


def test_a_file_that_is_not_a_mapping_is_refused_with_the_reason(tmp_path: Path) -> None:
    cases = {
        b"- 1\n- 2\n": "settings",
        b"": "settings",
        b"a: \xff\xfe": "utf-8",
        b"# " + b"x" * safe_yaml.MAX_BYTES: "larger",
    }
    for i, (data, reason) in enumerate(cases.items()):
        path = tmp_path / f"{i}.yaml"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=reason):
            safe_yaml.read_mapping(path)


def test_reading_a_fifo_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(OSError, match="regular file"):
        safe_yaml.read_mapping(tmp_path / "config.yaml")
