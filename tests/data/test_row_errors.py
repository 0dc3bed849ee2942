"""A row that does not hold what its format needs says why."""

from __future__ import annotations

import pytest

from runner.data.formats import FORMATS, ColumnNames
from runner.data.row_errors import RowError

USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("text", {"txt": "a"}, "no key 'text'; it has: 'txt'. Did you mean 'txt'?"),
        ("text", {"text": 3}, "'text' is a number, not a string"),
        ("text", {"text": None}, "'text' is null"),
        ("text", {"text": ""}, "'text' is empty"),
        ("text", {"text": " \n"}, "'text' is empty"),
        ("text", {"text": "a\ud83d"}, "half of a surrogate pair at character 2"),
        ("completions", {"prompt": "a", "completions": "b"}, "Did you mean 'completions'?"),
        ("completions", {"prompt": ["a"], "completion": "b"}, "'prompt' is a list"),
        ("completions", {"prompt": "a", "completion": ""}, "'completion' is empty"),
        ("completions", {"prompt": "a", "completion": "b", "tools": "c"}, "'tools' is a string, not a list"),
        ("chat", {"messages": "a"}, "'messages' is a string"),
        ("chat", {"messages": []}, "'messages' is an empty list"),
        ("chat", {"messages": ["a"]}, "message 1 is a string"),
        ("chat", {"messages": [USER, {"from": "gpt", "value": "b"}]}, "message 2 has no 'role'"),
        ("chat", {"messages": [USER, {"role": "gpt", "content": "b"}]}, "Did you mean 'assistant'?"),
        ("chat", {"messages": [{"role": "usr", "content": "b"}]}, "Did you mean 'user'?"),
        ("chat", {"messages": [{"role": 3, "content": "b"}]}, "has the role 3"),
        ("chat", {"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
        ("chat", {"messages": [{"role": "user", "contents": "a"}]}, "Did you mean 'contents'?"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "the content of message 1 is null"),
        ("chat", {"messages": [{"role": "assistant", "content": True}]}, "message 1 is a boolean"),
        ("chat", {"messages": [{"role": "user", "content": ["a"]}]}, "message 1 holds a string"),
    ],
)
def test_a_bad_row_says_why(name, row, words):
    with pytest.raises(RowError) as caught:
        FORMATS[name].check(row, ColumnNames())
    assert words in str(caught.value)


def test_tool_calls_may_stand_for_content():
    call = {"role": "assistant", "tool_calls": [{"type": "function"}]}
    for message in (call, {**call, "content": None}):
        FORMATS["chat"].check({"messages": [USER, message]}, ColumnNames())
