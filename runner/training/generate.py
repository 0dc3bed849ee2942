"""Answers generated for held-out rows, greedily and in batches, and scored by the data set's own metric."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper

from runner.common.errors import DataError
from runner.data.chat_spans import TextEncoder
from runner.data.formats import EncodeOptions
from runner.data.metrics import Metric

BATCH_SIZE = 32
"""Rows decoded at once: what a step costs hardly grows up to here on the CPU."""


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
    seconds: float


def generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    rows: Sequence[Mapping[str, Any]],
    reading: EncodeOptions,
    metric: Metric,
    *,
    max_tokens: int,
    each: Callable[[], None] = lambda: None,
) -> GenerationResult:
    """Greedy answers to `rows` and their mean score; `each` is called before every decoding step and may raise."""
    begun = time.perf_counter()
    model.eval()
    encoder = TextEncoder(tokenizer)
    asked = [question(row, reading) for row in rows]
    prompts = [_prompt_tokens(turns, row, encoder, reading) for (turns, _), row in zip(asked, rows, strict=True)]
    tokens = _decode(model, tokenizer, prompts, max_tokens, each)
    answers = []
    for i, (row, (turns, expected), made) in enumerate(zip(rows, asked, tokens, strict=True)):
        text = tokenizer.decode(made)
        answers.append(Answer(i, turns[-1]["content"], expected, text, metric.score(row, text)))
    score = sum(a.score for a in answers) / max(1, len(answers))
    return GenerationResult(answers, score, sum(len(t) for t in tokens), time.perf_counter() - begun)


def question(row: Mapping[str, Any], reading: EncodeOptions) -> tuple[list[dict[str, Any]], str]:
    """The turns that ask, and the expected answer: of a chat, all before the last assistant turn.

    Raises:
        DataError: the row has no question and answer (plain text).
    """
    keys = reading.keys
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


def _prompt_tokens(
    turns: list[dict[str, Any]], row: Mapping[str, Any], encoder: TextEncoder, reading: EncodeOptions
) -> list[int]:
    if encoder.has_template and reading.chat_template:
        return encoder.chat(turns, row.get("tools"), prompt=True)
    return encoder.encode(turns[-1]["content"])


def _decode(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    prompts: list[list[int]],
    max_tokens: int,
    each: Callable[[], None],
) -> list[list[int]]:
    # Rows of near lengths are decoded together; the order of the answers is that of the prompts.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    made: list[list[int]] = [[] for _ in prompts]
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(tokenizer.eos_token_ids)],
        completion_batch_size=BATCH_SIZE,
        prefill_batch_size=BATCH_SIZE,
    )
    try:
        ids = generator.insert([prompts[i] for i in order], [max_tokens] * len(prompts))
        place = dict(zip(ids, order, strict=True))
        each()
        while responses := generator.next_generated():
            each()
            for response in responses:
                if response.finish_reason != "stop":
                    made[place[response.uid]].append(response.token)
    finally:
        generator.close()
    return made
