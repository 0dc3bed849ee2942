"""Rows of other programs' formats as messages, or as a prompt and a completion. Nothing that a row says is dropped."""

from __future__ import annotations

import json
from typing import Any

from runner.common.errors import did_you_mean
from runner.common.text import shorten
from runner.config.schema import KeysConfig
from runner.data.jsonl import json_type
from runner.data.row_errors import RowError

Row = dict[str, Any]

SHAREGPT_ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "ai", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response", "function"), "tool"),
}
"""What the field ``from`` may say, and the role that it means; ``function_call`` is a tool call of the assistant."""
_FUNCTION_CALLS = ("function_call", "tool_call")
_ALPACA_PROMPT = "Below is an instruction that describes a task{paired}. Write a response that appropriately completes "
_ALPACA_PROMPT += "the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
_ALPACA_PAIRED = ", paired with an input that provides further context"
"""The prompt of github.com/tatsu-lab/stanford_alpaca, which models without a chat template were trained on."""


def sharegpt_messages(row: Row, keys: KeysConfig) -> Row:
    """Return a ShareGPT row with its turns as messages. Raises RowError for a turn that has no meaning."""
    turns = row[keys.conversations]
    if not isinstance(turns, list):
        raise RowError(f"'{keys.conversations}' is {json_type(turns)}, not a list of turns")
    messages = [_sharegpt_message(turn, f"turn {number}") for number, turn in enumerate(turns, start=1)]
    rest = {key: value for key, value in row.items() if key != keys.conversations}
    return {**_with_tools_as_list(rest), keys.messages: [*_system_turn(row, messages), *messages]}


def _sharegpt_message(turn: Any, name: str) -> Row:
    if not isinstance(turn, dict):
        raise RowError(f"{name} is {json_type(turn)}, not an object with 'from' and 'value'")
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if speaker is None or ("value" not in turn and "content" not in turn):
        raise RowError(f"{name} has no '{'value' if speaker else 'from'}'.{did_you_mean('value', turn)}")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    if speaker in _FUNCTION_CALLS:
        return {"role": "assistant", "content": None, "tool_calls": _function_calls(text, name), **rest}
    role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = [*SHAREGPT_ROLES, *_FUNCTION_CALLS]
        raise RowError(
            f"{name} is from {shorten(repr(speaker), 60)}; known: {', '.join(known)}."
            f"{did_you_mean(str(speaker), known)}"
        )
    return {"role": role, "content": text, **rest}


def _function_calls(text: Any, name: str) -> list[Row]:
    """Return the tool calls of a turn, whose text is a JSON object, or a list of them, with name and arguments."""
    calls = _parsed(text)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(f"{name} is a function call, but its value is no JSON object with 'name' and 'arguments'")
    return [{"type": "function", "function": call} for call in calls]


def alpaca_conversation(row: Row, keys: KeysConfig) -> Row:
    """Return an Alpaca row as messages: instruction and input are the user's turn. Raises RowError if they are none."""
    instruction, given, output = _alpaca_fields(row, keys)
    messages: list[Row] = []
    for pair in _history(row):
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1], "train": False}]
    user = f"{instruction}\n\n{given}" if instruction and given else instruction + given
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": output}]
    return {**_without_alpaca_fields(row, keys), keys.messages: [*_system_turn(row, messages), *messages]}


def alpaca_completion(row: Row, keys: KeysConfig) -> Row:
    """Return an Alpaca row as prompt and completion, for a model without a chat template. Raises RowError."""
    instruction, given, output = _alpaca_fields(row, keys)
    for name in ("history", "system"):
        if row.get(name):
            raise RowError(f"'{name}' needs a chat template")
    prompt = _ALPACA_PROMPT.format(
        paired=_ALPACA_PAIRED if given else "",
        instruction=instruction,
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    return {**_without_alpaca_fields(row, keys), keys.prompt: prompt, keys.completion: output}


def _alpaca_fields(row: Row, keys: KeysConfig) -> tuple[str, str, str]:
    instruction, given, output = row[keys.instruction], row.get(keys.input) or "", row[keys.output]
    for name, value in ((keys.instruction, instruction), (keys.input, given), (keys.output, output)):
        if not isinstance(value, str):
            raise RowError(f"'{name}' is {json_type(value)}, not a string")
    if not output.strip():
        raise RowError(f"'{keys.output}' is empty")
    if not (instruction + given).strip():
        raise RowError(f"'{keys.instruction}' is empty")
    return instruction, given, output


def _history(row: Row) -> list[list[str]]:
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"'history' is {json_type(history)}, not a list of pairs")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError("'history' has an entry that is no pair of texts")
    return history


def _without_alpaca_fields(row: Row, keys: KeysConfig) -> Row:
    """Return the other fields of the row; tools may be JSON text."""
    fields = (keys.instruction, keys.input, keys.output, "history", "system")
    return _with_tools_as_list({key: value for key, value in row.items() if key not in fields})


def preferred(row: Row, keys: KeysConfig) -> Row:
    """Return a preference row as the row that its chosen answer makes: messages, prompt and completion, or text."""
    chosen, prompt = row[keys.chosen], row.get(keys.prompt)
    rest = {key: value for key, value in row.items() if key not in (keys.chosen, keys.rejected, keys.prompt)}
    if isinstance(chosen, dict):  # one message
        chosen = [chosen]
    if isinstance(chosen, list):
        if isinstance(prompt, list):
            repeated = len(prompt) if len(chosen) > len(prompt) and chosen[: len(prompt)] == prompt else 0
            return prompt_and_answer(rest, prompt, chosen[repeated:], keys)
        first = chosen[0] if chosen else None
        lacks_prompt = len(chosen) == 1 or (isinstance(first, dict) and first.get("role") == "assistant")
        if isinstance(prompt, str) and lacks_prompt:
            chosen = [{"role": "user", "content": prompt}, *chosen]
        return {**rest, keys.messages: chosen}
    if isinstance(prompt, list):
        return prompt_and_answer(rest, prompt, [{"role": "assistant", "content": chosen}], keys)
    if prompt is None:
        return {**rest, keys.text: chosen}
    return {**rest, keys.prompt: prompt, keys.completion: chosen}


def prompt_and_answer(rest: Row, prompt: Any, answer: Any, keys: KeysConfig) -> Row:
    """Return messages of which those of the `answer` are trained on, and the assistant's in the `prompt` are not."""
    before = [
        {**message, "train": False, "training": None}
        if isinstance(message, dict) and message.get("role") == "assistant"
        else message
        for message in prompt
    ]
    return {**rest, keys.messages: [*before, *answer]}


def _system_turn(row: Row, messages: list[Row]) -> list[Row]:
    system = row.get("system")
    if not system or (messages and messages[0]["role"] == "system"):
        return []
    return [{"role": "system", "content": system}]


def _with_tools_as_list(row: Row) -> Row:
    tools = row.get("tools")
    if not isinstance(tools, str):
        return row
    return {**row, "tools": _parsed(tools) if tools.strip() else None}


def _parsed(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
