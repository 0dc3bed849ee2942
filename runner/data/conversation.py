"""Bringing the messages of a row into the form that a chat template takes, without losing anything that they say.

Rows come in several dialects: content as text or as a list of parts, arguments of a tool call as an object or as JSON
text, reasoning in a field of its own or as a ``<think>`` block. Templates take one dialect each, and many ignore what
they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from runner.common.text import shorten
from runner.data.jsonl import json_type
from runner.data.row_errors import RowError
from runner.data.template_traits import TemplateTraits, as_parts, split_think_block, think_block
from runner.data.text_encoder import Message

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that hold reasoning; transformers passes all of them on as the first."""
TOOL_ROLES = ("tool", "function", "ipython", "observation", "environment")
_TRAIN_FIELDS = ("weight", "train", "training")
_DETAIL_FIELDS = ("train_detail", "training_detail")
_REASONING_PARTS = ("thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message in the form that the template takes, and what it says."""

    message: Message
    trained: bool
    """Whether it is an assistant's turn that is to be supervised."""
    text: str
    """The content without reasoning, stripped."""
    reasoning: str
    """The reasoning, stripped."""
    calls: tuple[tuple[str, tuple[str, ...]], ...]
    """The name of each tool call, with the keys and the texts and numbers among its arguments."""

    @property
    def role(self) -> str:
        role: str = self.message["role"]
        return role


def normalize(messages: list[Message], traits: TemplateTraits) -> list[Turn]:
    """Return the messages in the form that the template takes.

    Raises:
        RowError: a message says something that cannot be trained on as text, or an assistant's says nothing.
    """
    return [_normalize_message(message, f"message {number}", traits) for number, message in enumerate(messages, 1)]


def _normalize_message(message: Message, name: str, traits: TemplateTraits) -> Turn:
    is_assistant = message["role"] == "assistant"
    trained = is_trained(message, name)
    normal = {key: value for key, value in message.items() if key not in _TRAIN_FIELDS}
    content, reasoning = _text_and_reasoning(message.get("content"), name, message["role"])
    reasoning = next((message[key] for key in REASONING_FIELDS if message.get(key)), reasoning)
    if not isinstance(reasoning, str):
        raise RowError(f"the reasoning of {name} is {json_type(reasoning)}, not a string")
    calls = [_tool_call(call, name) for call in message.get("tool_calls") or []] if is_assistant else []
    if isinstance(message.get("content"), list) or not isinstance(message.get("content"), str | None):
        normal["content"] = content
    if calls:
        normal = _with_calls(normal, calls, traits)
    if is_assistant:
        if reasoning and not message.get("reasoning_content"):
            normal = {k: v for k, v in normal.items() if k not in REASONING_FIELDS} | {"reasoning_content": reasoning}
        normal, reasoning, content = _place_reasoning(normal, reasoning, content, traits)
        if trained and not (content.strip() or reasoning.strip() or calls):
            raise RowError(f"{name} has no text, reasoning or tool call to learn (weight: 0 leaves its turn out)")
    if traits.takes_parts_only:
        normal = as_parts(normal)
    said = tuple((call["function"]["name"], tuple(_leaves(call["function"]["arguments"]))) for call in calls)
    return Turn(normal, trained, content.strip(), reasoning.strip(), said)


def is_trained(message: Message, name: str = "the message") -> bool:
    """Return whether a message is an assistant's and is not left out by ``weight: 0`` or ``train: false``.

    Raises:
        RowError: another value of these fields, or one that trains on a turn of somebody else.
    """
    is_assistant = message["role"] == "assistant"
    weight = message.get("weight")
    train = message.get("train") if message.get("train") is not None else message.get("training")  # Axolotl's name
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError(f"the weight of {name} is {shorten(json.dumps(weight), 60)}; it can be 0 or 1")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"'train' of {name} is {json_type(train)}, not true or false")
    if message.get("train") is not None and message.get("training") not in (None, train):
        raise RowError(f"'train' and 'training' of {name} contradict each other")
    if detail := next((key for key in _DETAIL_FIELDS if message.get(key)), None):
        raise RowError(f"'{detail}' of {name} leaves out parts of a message; only whole messages can be left out")
    if train and not is_assistant:
        raise RowError(f"'train' of {name} is true, but only turns of the assistant are trained on")
    if train and weight == 0:
        raise RowError(f"'weight' and 'train' of {name} contradict each other")
    return is_assistant and weight != 0 and train is not False


def _text_and_reasoning(content: Any, name: str, role: str) -> tuple[str, str]:
    """Return the text of a content and the reasoning among its parts.

    A tool's result may be any JSON value: other than text and parts, it is written as JSON.
    """
    if content is None or isinstance(content, str):
        return content or "", ""
    if role in TOOL_ROLES and not _is_parts(content):
        return json.dumps(content, ensure_ascii=False), ""
    text, reasoning = "", ""
    for part in content:
        kind = part.get("type", "text")
        if kind == "text":
            text += _part_text(part.get("text"), name)
        elif kind in _REASONING_PARTS and role == "assistant":
            reasoning += _part_text(part.get(kind, part.get("text")), name)
        else:
            raise RowError(
                f"the content of {name} has a part of type {shorten(repr(kind), 60)}; only text is trained on"
            )
    return text, reasoning


def _part_text(text: Any, name: str) -> str:
    if isinstance(text, list):  # Mistral's parts of reasoning hold parts of text
        return "".join(_part_text(part.get("text") if isinstance(part, dict) else part, name) for part in text)
    if not isinstance(text, str):
        raise RowError(f"a part of the content of {name} is {json_type(text)}, not a string")
    return text


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """Return a tool call as ``{"function": {"name": …, "arguments": …}, …}`` with its arguments as an object."""
    if not isinstance(call, dict):
        raise RowError(f"a tool call of {name} is {json_type(call)}, not an object")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError(f"a tool call of {name} has no function with a name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise RowError(f"the arguments of a tool call of {name} are text that is not JSON") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(f"the arguments of a tool call of {name} are {json_type(arguments)}, not an object")
    if "function" in call:
        return {**call, "function": {**function, "arguments": arguments}}
    outer = {key: value for key, value in call.items() if key not in ("name", "arguments", "parameters")}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}}


def _with_calls(message: Message, calls: list[dict[str, Any]], traits: TemplateTraits) -> Message:
    """Return the message with its tool calls in the form that the template takes.

    Where it takes arguments as objects and as JSON text, those of the row stay as they are. Where it has no place for
    tool calls, the rendered row shows that, and is refused.
    """
    form = traits.tool_calls
    if form is None:
        return {**message, "content": message.get("content") or "", "tool_calls": calls}
    if not message.get("content"):
        message = {**message, "content": form.content}
    placed = []
    for call, original in zip(calls, message["tool_calls"], strict=True):
        function, written = call["function"], original.get("function", original).get("arguments")
        arguments = function["arguments"]
        if isinstance(written, str) and str in form.arguments and written.strip():
            arguments = written
        elif dict not in form.arguments:
            arguments = json.dumps(arguments, ensure_ascii=False)
        placed.append({**call, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": placed}


def _place_reasoning(
    message: Message, reasoning: str, content: str, traits: TemplateTraits
) -> tuple[Message, str, str]:
    """Return the message with its reasoning where the template takes it, the reasoning, and the content without it."""
    if reasoning:
        if not traits.renders_reasoning_field and traits.renders_think_block:
            without = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
            return without | {"content": think_block(reasoning.strip()) + content}, reasoning, content
        return message, reasoning, content
    inside, answer = split_think_block(content)
    if inside and traits.renders_reasoning_field and not traits.think_block_is_reasoning:
        return {**message, "content": answer, "reasoning_content": inside}, inside, answer
    return message, inside, answer


def _leaves(value: Any) -> Iterator[str]:
    """Yield the keys, texts and whole numbers of a tool call's arguments."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        yield str(value)
