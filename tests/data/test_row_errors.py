"""A row that does not fit its format is refused with the reason."""

from __future__ import annotations

import pytest

from runner.config.schema import KeysConfig
from runner.data.formats import FORMATS
from runner.data.row_errors import RowError

USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("text", {"txt": "a"}, "no key 'text'; the row has: 'txt'. Did you mean 'txt'?"),
        ("text", {"text": 3}, "'text' is a number, not a string"),
        ("text", {"text": None}, "'text' is null"),
        ("text", {"text": ""}, "'text' is empty"),
        ("text", {"text": " \n"}, "'text' is empty"),
        ("text", {"text": "a\ud83d"}, "has half of a surrogate pair at character 2"),
        ("completions", {"prompt": "a", "completions": "b"}, "Did you mean 'completions'?"),
        ("completions", {"prompt": ["a"], "completion": "b"}, "'prompt' is a list, not a string"),
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
        ("chat", {"messages": [{"role": "user", "content": ["a"]}]}, "message 1 contains a string"),
    ],
)
def test_an_invalid_row_is_refused_with_the_reason(name, row, message):
    with pytest.raises(RowError) as caught:
        FORMATS[name].validate(row, KeysConfig())
    assert message in str(caught.value)


def test_an_assistant_message_may_have_tool_calls_instead_of_content():
    call = {"role": "assistant", "tool_calls": [{"type": "function"}]}
    for message in (call, {**call, "content": None}):
        FORMATS["chat"].validate({"messages": [USER, message]}, KeysConfig())
