"""Answers to held-out rows, generated greedily in batches and scored by the data set's metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper

from runner.common.errors import DataError
from runner.data.formats import EncodeOptions
from runner.data.metrics import Metric
from runner.data.text_encoder import TextEncoder

BATCH_SIZE = 32
"""Rows decoded at once. On the CPU, the cost of a decoding step hardly grows up to this size."""


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    row: int
    """Index of the row in its split."""
    prompt: str
    expected: str
    text: str
    score: float


@dataclass(frozen=True)
class GenerationResult:
    """The answers to a set of rows."""

    answers: list[Answer]
    score: float
    """Mean score."""
    tokens: int
    """Generated tokens."""


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    rows: Sequence[Mapping[str, Any]],
    options: EncodeOptions,
    metric: Metric,
    *,
    max_tokens: int,
    before_step: Callable[[], None] = lambda: None,
) -> GenerationResult:
    """Generate greedy answers to `rows` and score them.

    `before_step` is called before every decoding step and may raise to stop.
    """
    model.eval()
    encoder = TextEncoder(tokenizer, options.template)
    questions = [split_row(row, options) for row in rows]
    prompts = [_encode_prompt(turns, row, encoder, options) for (turns, _), row in zip(questions, rows, strict=True)]
    token_ids = _decode(model, tokenizer, prompts, max_tokens, before_step)
    answers = []
    for index, (row, (turns, expected), ids) in enumerate(zip(rows, questions, token_ids, strict=True)):
        text = tokenizer.decode(ids)
        answers.append(Answer(index, turns[-1]["content"], expected, text, metric.score(row, text)))
    score = sum(answer.score for answer in answers) / max(1, len(answers))
    return GenerationResult(answers, score, sum(map(len, token_ids)))


def split_row(row: Mapping[str, Any], options: EncodeOptions) -> tuple[list[dict[str, Any]], str]:
    """Split a row into the turns of the question and the expected answer, in a chat the last assistant turn.

    Raises:
        DataError: the row has no question and answer, such as plain text.
    """
    keys = options.keys
    if keys.prompt in row and keys.completion in row:
        return [{"role": "user", "content": row[keys.prompt]}], row[keys.completion]
    messages = row.get(keys.messages) or []
    for end in range(len(messages) - 1, 0, -1):
        if messages[end]["role"] == "assistant":
            return messages[:end], messages[end]["content"]
    raise DataError(
        "data.metric_rows generates answers, which needs rows with prompt and completion, or messages that end with "
        "an assistant turn."
    )


def _encode_prompt(
    turns: list[dict[str, Any]], row: Mapping[str, Any], encoder: TextEncoder, options: EncodeOptions
) -> list[int]:
    if encoder.has_chat_template and options.chat_template:
        return encoder.encode_chat(turns, row.get("tools"), add_generation_prompt=True)
    return encoder.encode(turns[-1]["content"])


def _decode(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: list[list[int]],
    max_tokens: int,
    before_step: Callable[[], None],
) -> list[list[int]]:
    """Generate a continuation of each prompt; prompts of similar length are decoded together."""
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    generated: list[list[int]] = [[] for _ in prompts]
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(tokenizer.eos_token_ids)],
        completion_batch_size=BATCH_SIZE,
        prefill_batch_size=BATCH_SIZE,
    )
    try:
        ids = generator.insert([prompts[i] for i in by_length], [max_tokens] * len(prompts))
        prompt_of = dict(zip(ids, by_length, strict=True))
        before_step()
        while responses := generator.next_generated():
            before_step()
            for response in responses:
                if response.finish_reason != "stop":
                    generated[prompt_of[response.uid]].append(response.token)
    finally:
        generator.close()
    return generated
