"""Rows as the answers that a method of training compares: the two of a preference pair, or one that is good or bad."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from runner.config.schema import KeysConfig
from runner.data import conversions
from runner.data.chat_spans import prompt_length
from runner.data.encoded import Encoded
from runner.data.formats import FORMATS, EncodeOptions, RowFormat
from runner.data.jsonl import json_type
from runner.data.row_errors import RowError
from runner.data.text_encoder import TextEncoder
from runner.data.token_set import TokenSet

Row = dict[str, Any]


def encode_answers(row: Row, row_format: RowFormat, encoder: TextEncoder, options: EncodeOptions) -> Encoded:
    """Return the answers of a valid row that the method reads, each a token row: see `EncodeOptions.answers`.

    Raises:
        RowError: the row lacks what the method compares, or cannot be encoded.
    """
    keys = options.keys
    if options.answers == "chosen":
        if row.get(keys.label) is False:
            raise RowError(
                f"'{keys.label}' is false: an unwanted answer. Remove such rows, or train on both kinds with method=kto"
            )
        return row_format.encode(row, encoder, options)
    if row_format is FORMATS["preference"]:
        return _encode_pair(row, encoder, options)
    if options.answers == "pairs":
        raise RowError(
            f"no pair of answers: this method needs rows of the preference format, with '{keys.chosen}' and "
            f"'{keys.rejected}'"
        )
    label = row.get(keys.label)
    if not isinstance(label, bool):
        found = f"is {json_type(label)}" if keys.label in row else "is missing"
        raise RowError(
            f"'{keys.label}' {found}: method=kto needs true for a good answer and false for a bad one, or "
            f"rows with '{keys.chosen}' and '{keys.rejected}'"
        )
    encoded = row_format.encode(row, encoder, options)
    return replace(encoded, unwanted=(not label,) * len(encoded.rows))


def _encode_pair(row: Row, encoder: TextEncoder, options: EncodeOptions) -> Encoded:
    """Return the better and the worse answer of a preference row, in this order."""
    keys = options.keys
    chosen, rejected = row[keys.chosen], row[keys.rejected]
    if isinstance(chosen, str) and isinstance(rejected, str) and keys.prompt not in row:
        prompt = _shared_text(chosen, rejected)
        return _pair([_encode_text(text, prompt, encoder, options) for text in (chosen, rejected)], keys)
    shared = _shared_turns(chosen, rejected)
    return _pair([_encode_answer(row, name, shared, encoder, options) for name in (keys.chosen, keys.rejected)], keys)


def _pair(answers: list[Encoded], keys: KeysConfig) -> Encoded:
    for name, answer in zip((keys.chosen, keys.rejected), answers, strict=True):
        if len(answer.rows) != 1:
            raise RowError(f"'{name}' has several turns of the assistant that the chat template renders apart")
    if answers[0].rows == answers[1].rows:
        raise RowError(f"'{keys.chosen}' and '{keys.rejected}' are the same")
    chosen, rejected = answers
    return Encoded(
        [*chosen.rows, *rejected.rows],
        unwanted=(False, True),
        lost_reasoning=chosen.lost_reasoning + rejected.lost_reasoning,
        lost_context=max(chosen.lost_context, rejected.lost_context),
    )


def _encode_answer(row: Row, name: str, shared: int, encoder: TextEncoder, options: EncodeOptions) -> Encoded:
    """Encode the answer in the field `name`, of which the first `shared` turns are no part."""
    keys = options.keys
    fields = {key: value for key, value in row.items() if key != keys.rejected}
    answer = conversions.preferred({**fields, keys.chosen: row[name]}, keys)
    if shared and keys.messages in answer:
        messages = answer.pop(keys.messages)
        answer = conversions.prompt_and_answer(answer, messages[:shared], messages[shared:], keys)
    row_format = next(
        found
        for found in (FORMATS["chat"], FORMATS["completions"], FORMATS["text"])
        if all(key in answer for key in found.required_keys(keys))
    )
    try:
        row_format.validate(answer, keys)
    except RowError as error:
        raise RowError(f"{error} (of '{name}')") from None
    return row_format.encode(answer, encoder, options)


def _shared_turns(chosen: Any, rejected: Any) -> int:
    """Return how many turns both conversations begin with; the last of each is its answer."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return 0
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return shared


def _shared_text(chosen: str, rejected: str) -> str:
    """Return the prompt of two texts: what both begin with, up to a whole word."""
    length = next((i for i, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), None)
    shared = chosen[: min(len(chosen), len(rejected)) if length is None else length]
    return shared[: max(shared.rfind(" "), shared.rfind("\n")) + 1].rstrip(" ")


def _encode_text(text: str, prompt: str, encoder: TextEncoder, options: EncodeOptions) -> Encoded:
    tokens = encoder.append_eos(encoder.encode(text))
    return Encoded.single(tokens, [(prompt_length(encoder, prompt, tokens) if prompt else 0, len(tokens))])


def as_examples(answers: TokenSet, options: EncodeOptions) -> TokenSet:
    """Return encoded answers as the examples of the method: pairs, or labeled answers with mismatched ones."""
    if options.answers == "pairs":
        return answers.grouped(2)
    return with_mismatched_answers(answers, options.max_length) if options.answers == "labeled" else answers


def _next_of_another_line(lines: np.ndarray, index: int) -> int:
    """Return the first row after `index`, and after the last the first ones, that comes from another line; `index` if
    there is none."""
    other = (index + 1) % len(lines)
    while other != index and lines[other] == lines[index]:  # the answers of a pair are neighbours
        other = (other + 1) % len(lines)
    return other


def with_mismatched_answers(answers: TokenSet, max_length: int) -> TokenSet:
    """Return each row followed by its prompt with the answer of the next row of another line; the last is followed by
    the first.

    KTO estimates the KL divergence on these (Ethayarajh et al., arXiv:2402.01306, section 4.1). They are cut at
    `max_length`.
    """
    tokens, masks = [], []
    for index in range(len(answers)):
        row, mask = answers.row(index)
        other, other_mask = answers.row(_next_of_another_line(answers.lines, index))
        start, other_start = int(mask.argmax()), int(other_mask.argmax())
        mismatched = np.concatenate([row[:start], other[other_start:]])[:max_length]
        mismatched_mask = np.concatenate([mask[:start], other_mask[other_start:]])[:max_length]
        mismatched_mask[:1] = False  # nothing predicts it
        tokens += [row, mismatched]
        masks += [mask, mismatched_mask]
    offsets = np.cumsum([0, *map(len, tokens)]).astype(np.int64)
    return TokenSet(
        np.concatenate([np.zeros(0, np.int32), *tokens]),
        np.concatenate([np.zeros(0, bool), *masks]),
        offsets,
        np.repeat(answers.lines, 2),
        np.repeat(answers.unwanted, 2),
        rows_per_example=2,
    )
