"""Comparing what a row says with the text that the chat template made of it: nothing may be lost silently."""

from __future__ import annotations

import json
from collections.abc import Sequence

from runner.common.text import shorten
from runner.data.conversation import Turn


def lost_answer(turn: Turn, rendered: str) -> str | None:
    """Return what of an assistant's turn, beside its reasoning, is missing in its `rendered` text; None if nothing.

    A turn of which only the reasoning is lost still loses its answer if it has nothing else.
    """
    if turn.text and not contains(rendered, turn.text):
        return f"its text {shorten(repr(turn.text), 60)}"
    for name, values in turn.calls:
        if not contains(rendered, name):
            return f"its tool call {shorten(name, 60)!r}"
        for value in values:
            if not contains(rendered, value):
                return f"{shorten(repr(value), 60)} in the arguments of its tool call {shorten(name, 60)!r}"
    if turn.reasoning and not turn.text and not turn.calls and loses_reasoning(turn, rendered):
        return "its reasoning, beside which it has nothing"
    return None


def loses_reasoning(turn: Turn, rendered: str) -> bool:
    """Return whether the reasoning of an assistant's turn is missing in its `rendered` text."""
    return bool(turn.reasoning) and not contains(rendered, turn.reasoning)


def contains_reasoning(turn: Turn, rendered: str) -> bool:
    """Return whether the turn has reasoning and the `rendered` text has it."""
    return bool(turn.reasoning) and contains(rendered, turn.reasoning)


def lost_context(turns: Sequence[Turn], tools: object, rendered: str) -> int:
    """Return how many of the other messages, and of the tools, are missing in the rendered row."""
    lost = sum(bool(turn.text) and not turn.trained and not contains(rendered, turn.text) for turn in turns)
    for tool in tools if isinstance(tools, list) else []:
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        lost += isinstance(name, str) and not contains(rendered, name)
    return lost


def contains(rendered: str, text: str) -> bool:
    """Return whether `rendered` has `text`: as it is, with other white space, or escaped as JSON does."""
    text = text.strip()
    if text in rendered:
        return True
    # A template that writes tool results as JSON escapes them; one that trims lines changes white space.
    escaped = (json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    quoted = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return any(form in rendered for form in (*escaped, quoted)) or "".join(text.split()) in "".join(rendered.split())
