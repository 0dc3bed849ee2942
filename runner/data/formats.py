"""How a row becomes tokens and a mask: one small class and one entry in `FORMATS` for each format.

Token ids are those of mlx-lm's own data sets (``mlx_lm/tuner/datasets.py``); the mask differs in that every
turn of the assistant is supervised, not only the last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from runner.common.errors import ConfigError, DataError, did_you_mean
from runner.common.text import shorten
from runner.data.chat_spans import Conversation, Span, TextEncoder, common_prompt
from runner.data.jsonl import JsonlRow, json_type
from runner.data.row_errors import RowError

ROLES = (
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
    "ipython",
    "observation",
    "environment",
)
OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
}
TOO_LONG = ("truncate", "drop", "error")
_MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """The names that the columns have in the user's files."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """How rows are read.

    Raises:
        ConfigError: an unknown format or rule, or a max_length below 2.
    """

    format: str
    """``auto`` (by the first row's keys) or a name of `FORMATS`."""
    mask_prompt: bool
    """Supervise the completion, or the assistant's turns, only. Text is supervised as a whole."""
    max_length: int
    """In tokens."""
    on_too_long: str
    """``truncate``, ``drop`` or ``error``."""
    keys: ColumnNames = field(default_factory=ColumnNames)
    chat_template: bool = True
    """Render prompt and completion with the model's chat template, if it has one."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("format", self.format, ("auto", *FORMATS)),
            ("on_too_long", self.on_too_long, TOO_LONG),
        ):
            if value not in known:
                raise ConfigError(
                    f"data.{name} is '{value}'.{did_you_mean(str(value), known)} Known: {', '.join(known)}."
                )
        if self.max_length < 2:
            raise ConfigError(f"data.max_length is {self.max_length}; a row needs at least 2 tokens.")


class RowFormat(Protocol):
    """One way to write a row. `check` comes before `encode`; both raise BadRow with the reason."""

    needs_template: bool

    def columns(self, keys: ColumnNames) -> tuple[str, ...]:
        """The keys that a row of this format has."""

    def check(self, row: dict[str, Any], keys: ColumnNames) -> None:
        """Raises BadRow for a missing key, a wrong type or a value that cannot be trained on."""

    def encode(self, row: dict[str, Any], encoder: TextEncoder, reading: EncodeOptions) -> tuple[list[int], list[Span]]:
        """The row's tokens and the half-open ranges of them that are supervised."""


class Completions:
    """``{"prompt": ..., "completion": ...}``, optionally with ``tools``."""

    needs_template = False

    def columns(self, keys: ColumnNames) -> tuple[str, ...]:
        return (keys.prompt, keys.completion)

    def check(self, row: dict[str, Any], keys: ColumnNames) -> None:
        _require(row, self.columns(keys))
        _string(row[keys.prompt], f"'{keys.prompt}'")
        _words(row[keys.completion], f"'{keys.completion}'")
        _check_tools(row)

    def encode(self, row: dict[str, Any], encoder: TextEncoder, reading: EncodeOptions) -> tuple[list[int], list[Span]]:
        prompt, completion = row[reading.keys.prompt], row[reading.keys.completion]
        if encoder.has_template and reading.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return _conversation(turns, row, encoder, reading)
        if row.get("tools"):
            raise RowError("'tools' can only be shown to a model through a chat template")
        tokens = encoder.ended(encoder.encode(prompt + completion))
        start = common_prompt(encoder, prompt, tokens) if reading.mask_prompt else 0
        return tokens, [(start, len(tokens))]


class Chat:
    """``{"messages": [{"role": ..., "content": ...}, ...]}``, optionally with ``tools``."""

    needs_template = True

    def columns(self, keys: ColumnNames) -> tuple[str, ...]:
        return (keys.messages,)

    def check(self, row: dict[str, Any], keys: ColumnNames) -> None:
        _require(row, self.columns(keys))
        messages = row[keys.messages]
        if not isinstance(messages, list):
            raise RowError(f"'{keys.messages}' is {json_type(messages)}, not a list of messages")
        if not messages:
            raise RowError(f"'{keys.messages}' is an empty list")
        for number, message in enumerate(messages, start=1):
            _check_message(message, f"message {number}")
        _check_tools(row)

    def encode(self, row: dict[str, Any], encoder: TextEncoder, reading: EncodeOptions) -> tuple[list[int], list[Span]]:
        return _conversation(row[reading.keys.messages], row, encoder, reading)


class Text:
    """``{"text": ...}``: every token is supervised."""

    needs_template = False

    def columns(self, keys: ColumnNames) -> tuple[str, ...]:
        return (keys.text,)

    def check(self, row: dict[str, Any], keys: ColumnNames) -> None:
        _require(row, self.columns(keys))
        _words(row[keys.text], f"'{keys.text}'")

    def encode(self, row: dict[str, Any], encoder: TextEncoder, reading: EncodeOptions) -> tuple[list[int], list[Span]]:
        tokens = encoder.ended(encoder.encode(row[reading.keys.text]))
        return tokens, [(0, len(tokens))]


# The order is that in which `auto` tries them, and mlx-lm's.
FORMATS: dict[str, RowFormat] = {"completions": Completions(), "chat": Chat(), "text": Text()}


def choose_format(row: JsonlRow, encoder: TextEncoder, reading: EncodeOptions) -> RowFormat:
    """The format of a split, by its first row where ``reading.format`` is ``auto``.

    Raises:
        DataError: no format has the row's keys, or the format needs a chat template and there is none.
    """
    if reading.format != "auto":
        name = reading.format
    else:
        fitting = (n for n, f in FORMATS.items() if all(key in row.value for key in f.columns(reading.keys)))
        name = next(fitting, "")
    where = f"{row.file}:{row.line}"
    if not name:
        known = "; ".join(" and ".join(f"'{key}'" for key in f.columns(reading.keys)) for f in FORMATS.values())
        has = _names(row.value)
        raise DataError(
            f"{where}: no known format has these keys: {has}. Expected: {known}. "
            "Other names are set with data.keys, such as data.keys.text=body."
        )
    if FORMATS[name].needs_template and not (encoder.has_template and reading.chat_template):
        why = "data.chat_template is false" if encoder.has_template else "the model's tokenizer has none"
        raise DataError(
            f"{where}: rows of messages need a chat template, and {why}. "
            "Use an instruction-tuned model, or rows with prompt and completion, or text."
        )
    return FORMATS[name]


def _conversation(
    messages: list[dict[str, Any]], row: dict[str, Any], encoder: TextEncoder, reading: EncodeOptions
) -> tuple[list[int], list[Span]]:
    conversation = Conversation(encoder, messages, row.get("tools"))
    if reading.mask_prompt:
        return conversation.tokens, conversation.assistant_spans(reading.max_length)
    return conversation.tokens, [(0, len(conversation.tokens))]


def _require(row: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if key not in row:
            near = did_you_mean(key, set(row) - set(keys)) if len(row) <= _MOST_NAMED else ""
            raise RowError(f"no key '{key}'; it has: {_names(row)}.{near}")


def _names(row: dict[str, Any]) -> str:
    shown = ", ".join(f"'{shorten(key, 60)}'" for key in islice(row, _MOST_NAMED))
    return (shown or "none") + (f" and {len(row) - _MOST_NAMED} more" if len(row) > _MOST_NAMED else "")


def _string(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise RowError(f"{what} is {json_type(value)}, not a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"{what} holds half of a surrogate pair at character {error.start + 1}") from None


def _words(value: Any, what: str) -> None:
    _string(value, what)
    if not value.strip():
        raise RowError(f"{what} is empty")


def _check_message(message: Any, what: str) -> None:
    if not isinstance(message, dict):
        raise RowError(f"{what} is {json_type(message)}, not an object with 'role' and 'content'")
    _require_in(message, "role", what)
    role = message["role"]
    if role not in ROLES:
        meant = OTHER_NAMES.get(role) if isinstance(role, str) else None
        hint = f" Did you mean '{meant}'?" if meant else did_you_mean(str(role), ROLES)
        raise RowError(f"{what} has the role {shorten(repr(role), 60)}; known: {', '.join(ROLES)}.{hint}")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return
    _require_in(message, "content", what)
    parts = content if isinstance(content, list) else [{"text": content}]
    for part in parts:
        if not isinstance(part, dict):
            raise RowError(f"the content of {what} holds {json_type(part)}, not only objects")
        if "text" in part:
            _string(part["text"], f"the content of {what}")


def _require_in(message: dict[str, Any], key: str, what: str) -> None:
    if key not in message:
        raise RowError(f"{what} has no '{key}'.{did_you_mean(key, message)}")


def _check_tools(row: dict[str, Any]) -> None:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"'tools' is {json_type(tools)}, not a list")
