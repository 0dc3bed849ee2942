"""What form of messages a chat template takes, found by rendering the same small conversation in several forms."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runner.data.row_errors import RowError
from runner.data.text_encoder import Message, TextEncoder

_QUESTION, _ANSWER, _REASONING = "Xquestion", "Xanswer", "Xreasoning"
_TOOL, _ARGUMENTS = "Xtool", {"Xkey": "Xvalue"}
_ARGUMENTS_TEXT = json.dumps(_ARGUMENTS)
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ToolCallForm:
    """How a template takes tool calls."""

    arguments: tuple[type, ...]
    """The types of arguments that it renders right: dict, str or both."""
    content: str | None
    """The content of a message that has tool calls alone."""


class TemplateTraits:
    """The forms of messages that the encoder's chat template renders in full; each is found at its first use."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    @cached_property
    def takes_parts_only(self) -> bool:
        """Whether content has to be a list of parts: text as a string is not rendered."""
        if self._render(_exchange(_ANSWER), _QUESTION, _ANSWER) is not None:
            return False
        rendered = self._render([as_parts(message) for message in _exchange(_ANSWER)], _QUESTION, _ANSWER)
        # A template that knows no parts writes the list itself.
        return rendered is not None and "'type'" not in rendered and '"type"' not in rendered

    @cached_property
    def tool_calls(self) -> ToolCallForm | None:
        """How the template takes tool calls; None where no form renders the name and the arguments."""
        for content in (None, ""):
            as_object, as_text = (self._tool_call(form, content) for form in (_ARGUMENTS, _ARGUMENTS_TEXT))
            object_is_right = as_object is not None and str(_ARGUMENTS) not in as_object
            text_is_right = as_text is not None and _ARGUMENTS_TEXT in as_text
            if object_is_right and text_is_right:
                return ToolCallForm((dict, str) if as_object == as_text else (dict,), content)
            if object_is_right or text_is_right:
                return ToolCallForm((dict,) if object_is_right else (str,), content)
        return None

    @cached_property
    def renders_reasoning_field(self) -> bool:
        """Whether the template writes `reasoning_content` of the last turn."""
        return self._render(_exchange(_ANSWER, reasoning_content=_REASONING), _REASONING, _ANSWER) is not None

    @cached_property
    def renders_think_block(self) -> bool:
        """Whether the template writes a ``<think>`` block that stands in the content of the last turn."""
        return self._render(_exchange(think_block(_REASONING) + _ANSWER), _REASONING, _ANSWER) is not None

    @cached_property
    def think_block_is_reasoning(self) -> bool:
        """Whether the template treats a ``<think>`` block in the content as it does `reasoning_content`."""
        return self._render(_exchange(think_block(_REASONING) + _ANSWER), _ANSWER) == self._render(
            _exchange(_ANSWER, reasoning_content=_REASONING), _ANSWER
        )

    def opens_reasoning(self, end_of_prompt: str) -> bool:
        """Return whether a generation prompt that ends so opens a reasoning block, which the turn continues."""
        end = end_of_prompt.rstrip()
        return end.endswith(THINK_OPEN) or bool(end and self._reasoning_prefix.rstrip().endswith(end))

    @cached_property
    def reasoning_closing(self) -> str:
        """What comes between the reasoning of a turn and its answer."""
        rendered = self._render(_exchange(_ANSWER, reasoning_content=_REASONING), _REASONING, _ANSWER) or ""
        return rendered.partition(_REASONING)[2].partition(_ANSWER)[0] or f"\n{THINK_CLOSE}\n\n"

    @cached_property
    def _reasoning_prefix(self) -> str:
        """The rendered text before the reasoning of the last turn; empty where the template writes no reasoning."""
        rendered = self._render(_exchange(_ANSWER, reasoning_content=_REASONING), _REASONING, _ANSWER) or ""
        return rendered.partition(_REASONING)[0]

    def _tool_call(self, arguments: Any, content: str | None) -> str | None:
        call = {"id": "call12345", "type": "function", "function": {"name": _TOOL, "arguments": arguments}}
        messages = [_exchange("")[0], {"role": "assistant", "content": content, "tool_calls": [call]}]
        result = {"role": "tool", "content": "Xresult", "name": _TOOL, "tool_call_id": "call12345"}
        final = {"role": "assistant", "content": _ANSWER}
        for tail in ([], [result, final]):  # some templates refuse a conversation that ends with a call
            text = self._render([*messages, *tail], _TOOL, "Xkey", "Xvalue")
            if text is not None:
                return text
        return None

    def _render(self, messages: list[Message], *texts: str) -> str | None:
        """Return the rendered messages if they contain all `texts`, else None."""
        if self._needs_parts(messages):
            messages = [as_parts(message) for message in messages]
        try:
            rendered = self._encoder.render(messages)
        except RowError:
            return None
        return rendered if all(text in rendered for text in texts) else None

    def _needs_parts(self, messages: list[Message]) -> bool:
        # While `takes_parts_only` is being found, it is not known yet.
        return self.__dict__.get("takes_parts_only", False) and isinstance(messages[0].get("content"), str)


def as_parts(message: Message) -> Message:
    """Return the message with its content, if it is text, as a list of one part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def think_block(reasoning: str) -> str:
    """Return the reasoning as the block that comes before an answer."""
    return f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n"


def split_think_block(content: str) -> tuple[str, str]:
    """Return the reasoning and the answer of a content that begins with a ``<think>`` block; else no reasoning.

    The opening tag may be missing: some templates write it before the turn.
    """
    before, closing, after = content.partition(THINK_CLOSE)
    if not closing or (THINK_OPEN in before and before.split(THINK_OPEN)[0].strip()):
        return "", content
    return before.split(THINK_OPEN)[-1].strip(), after.strip("\n")


def _exchange(answer: str, **fields: Any) -> list[Message]:
    return [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": answer, **fields}]
