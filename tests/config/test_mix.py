"""The sources of data.mix are checked before anything is read."""

from __future__ import annotations

import pytest

from runner.common.errors import ConfigError


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        ([], "empty list"),
        ([{"weight": 1}], r"data\.mix\[0\] has no path"),
        ([{"path": "a", "wieght": 1}], "no setting 'wieght'. Did you mean 'weight'"),
        ([{"path": "a", "weight": 0}], r"data\.mix\[0\]\.weight=0 is invalid"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "give one to all or to none"),
        ([{"path": "a", "keys": {"promt": "q"}}], r"data\.mix\[0\]\.keys is invalid: must map some of text, prompt"),
        ([{"path": "a", "format": "json"}], "must be one of auto, text"),
    ],
)
def test_a_wrong_source_is_refused_with_its_number(mix, says, tiny):
    with pytest.raises(ConfigError, match=says):
        tiny(**{"data.mix": mix})


@pytest.mark.parametrize("value", ["[a.jsonl,b.jsonl]", "{path: a.jsonl}", "a.jsonl", "[{path: a}, b]", "[[a]]"])
def test_another_value_than_a_list_of_sources_is_answered_with_one(value, inline):
    printed = inline("model=tiny", f"data.mix={value}", expect=2)
    assert "data.mix is invalid: must be a list of sources, such as data.mix=[{path: a.jsonl}, " in printed


def test_a_mix_on_the_command_line_is_composed(inline):
    printed = inline("data.mix=[{path: a, weight: 2}, {path: b/c, weight: 1}]", "--cfg", "job")
    assert "- path: a\n    weight: 2\n" in printed
