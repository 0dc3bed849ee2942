"""The formats of a row and how each becomes tokens and a loss mask: one class and one entry in `FORMATS` per format.

Token ids equal those of mlx-lm's data sets (``mlx_lm/tuner/datasets.py``). The mask differs: every assistant turn is
supervised, not only the last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from runner.common.errors import DataError
from runner.config.schema import METHOD_ANSWERS, DataConfig, KeysConfig
from runner.data import conversions
from runner.data.chat_encoder import ChatEncoder
from runner.data.chat_spans import prompt_length
from runner.data.chat_template import TemplateOptions
from runner.data.encoded import Encoded
from runner.data.jsonl import JsonlRow, json_type
from runner.data.row_checks import (
    list_keys,
    require_keys,
    require_string,
    require_text,
    validate_message,
    validate_tools,
)
from runner.data.row_errors import RowError
from runner.data.text_encoder import Message, TextEncoder

_MEDIA_FIELDS = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeOptions:
    """The settings that decide the tokens and the mask of a row; `schema.DataConfig` documents and checks them."""

    answers: str
    """What the method trains on: the `chosen` answer of each row, `pairs` of a better and a worse answer, or `labeled`
    answers that are each good or bad."""
    format: str
    mask_prompt: bool
    max_length: int
    on_too_long: str
    keys: KeysConfig
    chat_template: bool
    system_prompt: str | None
    template: TemplateOptions

    def renders(self, encoder: TextEncoder) -> bool:
        """Return whether conversations are rendered with a chat template."""
        return self.chat_template and encoder.has_chat_template

    def of_source(self, row_format: str | None, keys: Mapping[str, str]) -> EncodeOptions:
        """Return the options of a source in data.mix with a format and keys of its own."""
        return replace(self, format=row_format or self.format, keys=replace(self.keys, **keys))

    @classmethod
    def from_config(cls, data: DataConfig, method: str = "sft") -> EncodeOptions:
        """Return the options of the data settings, which have the same names, and of `method.name`.

        Raises:
            DataError: data.template cannot be read.
        """
        names = [field.name for field in fields(cls) if field.name not in ("template", "answers")]
        values = {name: copy(getattr(data, name)) for name in names}
        return cls(template=TemplateOptions.from_config(data), answers=METHOD_ANSWERS[method], **values)


class RowFormat(Protocol):
    """One format of rows. `validate` comes before `encode`; both raise RowError with the reason."""

    needs_chat_template: bool

    def required_keys(self, keys: KeysConfig) -> tuple[str, ...]:
        """Return the keys that a row of this format has."""

    def validate(self, row: dict[str, Any], keys: KeysConfig) -> None:
        """Raise RowError for a missing key, a wrong type or an unusable value."""

    def encode(self, row: dict[str, Any], encoder: TextEncoder, options: EncodeOptions) -> Encoded:
        """Return the row's tokens and which of them are supervised."""

    def standardize(self, row: dict[str, Any], keys: KeysConfig, renders: bool) -> dict[str, Any]:
        """Return the row as text, prompt and completion, or messages; `renders`: see `EncodeOptions.renders`."""


class CompletionsFormat:
    """``{"prompt": ..., "completion": ...}``, optionally with ``tools``; both may be lists of messages."""

    needs_chat_template = False

    def required_keys(self, keys: KeysConfig) -> tuple[str, ...]:
        return (keys.prompt, keys.completion)

    def validate(self, row: dict[str, Any], keys: KeysConfig) -> None:
        require_keys(row, self.required_keys(keys))
        if isinstance(row[keys.prompt], list) or isinstance(row[keys.completion], list):
            for key in self.required_keys(keys):
                if isinstance(row[key], list) and not all(isinstance(message, dict) for message in row[key]):
                    raise RowError(f"'{key}' is a list, not a string or a list of messages")
            _CHAT.validate(self.standardize(row, keys, True), keys)
            return
        require_string(row[keys.prompt], f"'{keys.prompt}'")
        require_text(row[keys.completion], f"'{keys.completion}'")
        validate_tools(row)

    def standardize(self, row: dict[str, Any], keys: KeysConfig, renders: bool) -> dict[str, Any]:
        prompt, completion = row[keys.prompt], row[keys.completion]
        if not isinstance(prompt, list) and not isinstance(completion, list):
            return row
        rest = {key: value for key, value in row.items() if key not in (keys.prompt, keys.completion)}
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return conversions.prompt_and_answer(rest, turns, answer, keys)

    def encode(self, row: dict[str, Any], encoder: TextEncoder, options: EncodeOptions) -> Encoded:
        prompt, completion = row[options.keys.prompt], row[options.keys.completion]
        if isinstance(prompt, list) or isinstance(completion, list):
            return _CHAT.encode(self.standardize(row, options.keys, True), encoder, options)
        if options.renders(encoder):
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return _encode_conversation(messages, row, encoder, options)
        if row.get("tools"):
            raise RowError("'tools' needs a chat template")
        if options.system_prompt:
            raise RowError("data.system_prompt needs a chat template")
        tokens = encoder.append_eos(encoder.encode(prompt + completion))
        start = prompt_length(encoder, prompt, tokens) if options.mask_prompt else 0
        return Encoded.single(tokens, [(start, len(tokens))])


class ChatFormat:
    """``{"messages": [{"role": ..., "content": ...}, ...]}``, optionally with ``tools``."""

    needs_chat_template = True

    def required_keys(self, keys: KeysConfig) -> tuple[str, ...]:
        return (keys.messages,)

    def validate(self, row: dict[str, Any], keys: KeysConfig) -> None:
        require_keys(row, self.required_keys(keys))
        messages = row[keys.messages]
        if not isinstance(messages, list):
            raise RowError(f"'{keys.messages}' is {json_type(messages)}, not a list of messages")
        if not messages:
            raise RowError(f"'{keys.messages}' is an empty list")
        for number, message in enumerate(messages, start=1):
            validate_message(message, f"message {number}")
        validate_tools(row)

    def encode(self, row: dict[str, Any], encoder: TextEncoder, options: EncodeOptions) -> Encoded:
        return _encode_conversation(row[options.keys.messages], row, encoder, options)

    def standardize(self, row: dict[str, Any], keys: KeysConfig, renders: bool) -> dict[str, Any]:
        return row


class TextFormat:
    """``{"text": ...}``: every token is supervised."""

    needs_chat_template = False

    def required_keys(self, keys: KeysConfig) -> tuple[str, ...]:
        return (keys.text,)

    def validate(self, row: dict[str, Any], keys: KeysConfig) -> None:
        require_keys(row, self.required_keys(keys))
        require_text(row[keys.text], f"'{keys.text}'")

    def encode(self, row: dict[str, Any], encoder: TextEncoder, options: EncodeOptions) -> Encoded:
        tokens = encoder.append_eos(encoder.encode(row[options.keys.text]))
        return Encoded.single(tokens, [(0, len(tokens))])

    def standardize(self, row: dict[str, Any], keys: KeysConfig, renders: bool) -> dict[str, Any]:
        return row


class _ConvertedFormat(ABC):
    """A format whose rows become those of the formats above before anything else."""

    needs_chat_template = False

    def validate(self, row: dict[str, Any], keys: KeysConfig) -> None:
        require_keys(row, self.required_keys(keys))
        self._convert(row, keys, True)

    def encode(self, row: dict[str, Any], encoder: TextEncoder, options: EncodeOptions) -> Encoded:
        row, row_format = self._convert(row, options.keys, options.renders(encoder))
        return row_format.encode(row, encoder, options)

    @abstractmethod
    def required_keys(self, keys: KeysConfig) -> tuple[str, ...]:
        """Return the keys that a row of this format has."""

    @abstractmethod
    def standardize(self, row: dict[str, Any], keys: KeysConfig, renders: bool) -> dict[str, Any]:
        """Return the row as one of messages, of prompt and completion, or of text."""

    def _convert(self, row: dict[str, Any], keys: KeysConfig, renders: bool) -> tuple[dict[str, Any], RowFormat]:
        """Return the converted row, validated, and its format."""
        standard = self.standardize(row, keys, renders)
        row_format = next(
            found for found in (_CHAT, _COMPLETIONS, _TEXT) if all(key in standard for key in found.required_keys(keys))
        )
        row_format.validate(standard, keys)
        return standard, row_format


class ShareGptFormat(_ConvertedFormat):
    """``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}``."""

    needs_chat_template = True

    def required_keys(self, keys: KeysConfig) -> tuple[str, ...]:
        return (keys.conversations,)

    def standardize(self, row: dict[str, Any], keys: KeysConfig, renders: bool) -> dict[str, Any]:
        return conversions.sharegpt_messages(row, keys)


class AlpacaFormat(_ConvertedFormat):
    """``{"instruction": ..., "input": ..., "output": ...}``; without a chat template in Alpaca's own prompt."""

    def required_keys(self, keys: KeysConfig) -> tuple[str, ...]:
        return (keys.instruction, keys.output)

    def standardize(self, row: dict[str, Any], keys: KeysConfig, renders: bool) -> dict[str, Any]:
        return conversions.alpaca_conversation(row, keys) if renders else conversions.alpaca_completion(row, keys)


class PreferenceFormat(_ConvertedFormat):
    """``{"chosen": ..., "rejected": ...}``, often with ``prompt``: as text or messages. Only ``chosen`` is used."""

    def required_keys(self, keys: KeysConfig) -> tuple[str, ...]:
        return (keys.chosen, keys.rejected)

    def standardize(self, row: dict[str, Any], keys: KeysConfig, renders: bool) -> dict[str, Any]:
        return conversions.preferred(row, keys)


_CHAT, _COMPLETIONS, _TEXT = ChatFormat(), CompletionsFormat(), TextFormat()
FORMATS: dict[str, RowFormat] = {
    "completions": _COMPLETIONS,
    "chat": _CHAT,
    "text": _TEXT,
    "sharegpt": ShareGptFormat(),
    "alpaca": AlpacaFormat(),
    "preference": PreferenceFormat(),
}


def format_name(row: JsonlRow, options: EncodeOptions) -> str:
    """Return the format of a split; where ``options.format`` is ``auto``, the one that fits the split's first row.

    Raises:
        DataError: no format has the row's keys, or several have.
    """
    if options.format != "auto":
        return options.format
    required = {name: row_format.required_keys(options.keys) for name, row_format in FORMATS.items()}
    names = [name for name, keys in required.items() if all(key in row.value for key in keys)]
    if len(names) == 1:
        return names[0]
    if names:
        fields = "; ".join(f"{name}: {_quoted(required[name])}" for name in names)
        raise DataError(
            f"{row.location}: the row fits several formats ({fields}). Choose the one to train on: "
            + " or ".join(f"data.format={name}" for name in names)
        )
    expected = "; ".join(map(_quoted, required.values()))
    raise DataError(
        f"{row.location}: no known format has these keys: {list_keys(row.value)}. Expected: {expected}. "
        "Other names are set with data.keys, such as data.keys.text=body, or data.keys.prompt=question "
        "data.keys.completion=answer."
    )


def format_note(row: JsonlRow, name: str, options: EncodeOptions) -> str | None:
    """Return what the log says about fields of the row that training in the format `name` does not use."""
    keys = options.keys
    if name == "preference" and options.answers == "chosen":
        return (
            f"preference pairs: trains on '{keys.chosen}'; '{keys.rejected}' is not used "
            "(method=dpo and others train on both)"
        )
    if name == "chat" and keys.prompt in row.value:
        return f"trains on '{keys.messages}'; '{keys.prompt}' beside it is not used"
    if name in ("chat", "completions") and row.value.get("system"):
        return "'system' is not used: put it into the messages, or set data.system_prompt"
    return None


def _quoted(keys: tuple[str, ...]) -> str:
    return " and ".join(f"'{key}'" for key in keys)


def choose_format(row: JsonlRow, encoder: TextEncoder, options: EncodeOptions) -> RowFormat:
    """Return the format of a split with the first row `row`.

    Raises:
        DataError: no format or several have the row's keys, or the format needs a chat template and there is none.
    """
    name = format_name(row, options)
    if FORMATS[name].needs_chat_template and not options.renders(encoder):
        reason = "data.chat_template is false" if encoder.has_chat_template else "the model's tokenizer has none"
        raise DataError(
            f"{row.location}: rows of messages need a chat template, and {reason}. "
            "Use an instruction-tuned model, or rows with prompt and completion, or text."
        )
    return FORMATS[name]


def _encode_conversation(
    messages: list[Message], row: dict[str, Any], encoder: TextEncoder, options: EncodeOptions
) -> Encoded:
    if not options.renders(encoder):
        raise RowError("messages need a chat template")
    chat = encoder.find_once(ChatEncoder)
    messages = with_system_prompt(messages, options.system_prompt)
    return chat.encode(messages, row.get("tools"), options.max_length, options.mask_prompt)


def refuse_media(row: Mapping[str, Any], keys: KeysConfig) -> None:
    """Raise RowError for a row with an image, a video or a sound beside its text, which would not be trained on."""
    for field in _MEDIA_FIELDS:
        if row.get(field) and field not in vars(keys).values():
            raise RowError(f"'{field}' is not text; only text is trained on. Remove the field, or the row")


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Return the messages with `system_prompt`, if it is set, as a system turn where they begin with none."""
    if not system_prompt or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
