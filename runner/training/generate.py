"""Answers to held-out rows, generated greedily and scored by the data set's metric."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.common.errors import DataError
from runner.config.schema import Config
from runner.data.conversation import normalize
from runner.data.formats import EncodeOptions, with_system_prompt
from runner.data.metrics import METRICS, Metric
from runner.data.row_errors import RowError
from runner.data.template_traits import TemplateTraits
from runner.data.text_encoder import Message, TextEncoder
from runner.models.load import BaseModel
from runner.training.decoding import decode

_UNFINISHED_TAG = re.compile(r"[<\[][^<>\[\]\n]*$")
"""The start that two tags have in common, such as that of <think> and <tool_call>."""


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


@dataclass(frozen=True)
class Question:
    """A row taken apart."""

    turns: list[Message]
    """The conversation before the answer."""
    expected: str
    prompt_tokens: list[int]


def answer_rows(
    base: BaseModel,
    rows: Sequence[Mapping[str, Any]],
    config: Config,
    *,
    before_step: Callable[[], None] = lambda: None,
    log: Callable[[str], None] = lambda line: None,
) -> GenerationResult:
    """Answer `rows` and score the answers as the settings say; see `generate`."""
    data = config.data
    assert data.metric is not None
    return generate(
        base,
        rows,
        EncodeOptions.from_config(data),
        METRICS[data.metric],
        max_tokens=data.max_new_tokens,
        before_step=before_step,
        log=log,
        cache_probe=config.train.cache_probes,
    )


def generate(
    base: BaseModel,
    rows: Sequence[Mapping[str, Any]],
    options: EncodeOptions,
    metric: Metric,
    *,
    max_tokens: int,
    before_step: Callable[[], None] = lambda: None,
    log: Callable[[str], None] = lambda line: None,
    cache_probe: bool = True,
) -> GenerationResult:
    """Generate greedy answers to `rows` with `base`, which may carry an adapter, and score them.

    `before_step` is called before every decoding step and may raise to stop; `log` with lines for the user.
    `cache_probe`: see `decoding.decode`.

    Raises:
        DataError: a row has no question and answer, or cannot be rendered.
        ModelError: mlx-lm cannot generate with this architecture.
    """
    base.model.eval()
    encoder = TextEncoder(base.tokenizer, options.template)
    questions = []
    for number, row in enumerate(rows, start=1):
        try:
            questions.append(split_row(row, encoder, options))
        except RowError as reason:
            raise DataError(f"data.metric_rows: row {number} cannot be answered: {reason}.") from None
    token_ids = decode(
        base,
        [question.prompt_tokens for question in questions],
        max_tokens,
        before_step=before_step,
        log=log,
        cache_probe=cache_probe,
    )
    answers = []
    for index, (row, question, ids) in enumerate(zip(rows, questions, token_ids, strict=True)):
        text = base.tokenizer.decode(ids)
        # The metric compares with `completion` where a row has one.
        score = metric.score({**row, "completion": question.expected}, text)
        answers.append(Answer(index, _text_of(question.turns[-1]), question.expected, text, score))
    score = sum(answer.score for answer in answers) / max(1, len(answers))
    return GenerationResult(answers, score, sum(map(len, token_ids)))


def split_row(row: Mapping[str, Any], encoder: TextEncoder, options: EncodeOptions) -> Question:
    """Split a row into the question and the expected answer: the completion, or the last assistant turn of a chat.

    Where that turn calls tools, the expected answer is the call as the chat template renders it. Where the template
    has no place for calls, it is the last turn with a text.

    Raises:
        DataError: the row has no question and answer, such as plain text.
        RowError: the chat template fails on it.
    """
    keys = options.keys
    if keys.prompt in row and keys.completion in row:
        turns: list[Message] = [{"role": "user", "content": row[keys.prompt]}]
        return Question(turns, row[keys.completion], _encode_prompt(turns, row, encoder, options))
    messages = row.get(keys.messages) or []
    normal: list[Message] = list(messages)
    calls: list[tuple[str, ...]] = [()] * len(messages)
    if encoder.has_chat_template:
        said = normalize(messages, encoder.find_once(TemplateTraits))
        normal, calls = [turn.message for turn in said], [tuple(name for name, _ in turn.calls) for turn in said]
    for end in range(len(messages) - 1, 0, -1):
        if messages[end]["role"] != "assistant":
            continue
        turns = normal[:end]
        if calls[end]:
            expected = _rendered_call(turns, normal[end], calls[end], row.get("tools"), encoder)
        else:
            expected = _text_of(messages[end])
        if expected:
            return Question(turns, expected, _encode_prompt(turns, row, encoder, options))
    raise DataError(
        "data.metric_rows generates answers, which needs rows with prompt and completion, or messages that end with "
        "an assistant turn that has a text, or a tool call that the chat template renders."
    )


def _rendered_call(
    turns: list[Message], turn: Message, names: tuple[str, ...], tools: Any, encoder: TextEncoder
) -> str:
    """Return what the model generates for a turn that calls tools; empty where the template leaves the calls out."""
    whole = encoder.render([*turns, turn], tools)
    before, prompt = encoder.render(turns, tools), encoder.render(turns, tools, add_generation_prompt=True)
    if whole.startswith(prompt):
        answer = whole[len(prompt) :]
    elif whole.startswith(before):  # the generation prompt opens a block, such as one for thoughts, that is closed here
        length = next((i for i, pair in enumerate(zip(whole, prompt, strict=False)) if pair[0] != pair[1]), len(whole))
        shared = _UNFINISHED_TAG.sub("", whole[:length])
        answer = whole[len(shared) :]
    else:
        return ""
    if not all(name in answer for name in names):
        return ""
    tokens = encoder.encode(answer, add_special_tokens=False)
    ends = set(encoder.tokenizer.eos_token_ids)
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return str(encoder.tokenizer.decode(tokens[:length]))


def _text_of(turn: Message) -> str:
    """Return the text of a turn; of a list of parts, those that are text."""
    content = turn.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _encode_prompt(
    turns: list[Message], row: Mapping[str, Any], encoder: TextEncoder, options: EncodeOptions
) -> list[int]:
    if encoder.has_chat_template and options.chat_template:
        turns = with_system_prompt(turns, options.system_prompt)
        return encoder.encode_chat(turns, row.get("tools"), add_generation_prompt=True)
    return encoder.encode(_text_of(turns[-1]))
