"""Continuations of prompts, greedy or sampled: in batches where these give what one prompt at a time gives.

mlx-lm's batches pad prompts, which recurrent states take for tokens and some caches do not support. Whether a model's
batches are right is therefore measured: some of the prompts are continued in both ways and the log-probabilities
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator, generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache

from runner.backends import blas
from runner.common.errors import ModelError
from runner.common.result_cache import CachedResult
from runner.common.text import first_line
from runner.models.hidden_cache import numeric_platform
from runner.models.load import BaseModel

BATCH_SIZE = 32
"""Prompts continued at once. On the CPU, the cost of a decoding step hardly grows up to this size."""
_PROBE_PROMPTS = 3
"""Continued to test batches; with no more prompts than that, a test costs more than it saves."""
_PROBE_TOKENS = (1, 4, 2)
"""Generated for each of them: one leaves the batch and another joins it while the third is continued."""
_PROBE_VERSION = 2
_TOLERANCES = {mx.float32: 1e-4}
"""Largest difference of a log-probability, relative to the largest of the step; by dtype."""
_HALF_PRECISION_TOLERANCE = 5e-2
_WINDOW_NAMES = ("window", "chunk_size")
"""Parts of the names that configs and caches give to the number of tokens within which attention looks back."""

Prompts = Sequence[Sequence[int]]
Sampler = Callable[[mx.array], mx.array]
"""Log-probabilities (1, vocabulary) to the next token, (1,)."""


def decode(
    base: BaseModel,
    prompts: Prompts,
    max_tokens: int,
    *,
    before_step: Callable[[], None],
    log: Callable[[str], None],
    cache_probe: bool = True,
    in_batches: bool | None = None,
    is_finished: Callable[[int, Sequence[int]], bool] = lambda number, tokens: False,
    sampler: Callable[[int], Sampler] | None = None,
    with_end: bool = False,
) -> list[list[int]]:
    """Return a continuation of each prompt, up to the end of the answer or `max_tokens`.

    Args:
        base: the model, with or without an adapter, and its tokenizer.
        before_step: called before every step; may raise to stop.
        log: called with a line where prompts are continued one at a time.
        cache_probe: store on disk that batches are right for this base model and these prompts.
        in_batches: whether batches are right, where that is known already.
        is_finished: called with the number of a prompt and the tokens of its answer after each of them; says whether
            the answer ends there.
        sampler: returns the sampler of the prompt with a number; None continues with the most likely token.
        with_end: include the token of the model that ends an answer.

    Raises:
        ModelError: mlx-lm cannot generate with this architecture.
    """
    request = _Request(base, max_tokens, sorted(base.tokenizer.eos_token_ids), before_step, sampler, with_end)
    reason: str | None = None
    if in_batches or (in_batches is None and len(prompts) > _PROBE_PROMPTS):
        if in_batches is None:
            reason = why_not_in_batches(base, prompts, max_tokens, before_step, cache_probe)
        if reason is None:
            try:
                return _decode_batches(request, prompts, is_finished)
            except _BatchError as error:
                reason = str(error)
        log(f"answers are generated one at a time: {reason}")
    return [_decode_one(request, number, prompt, partial(is_finished, number)) for number, prompt in enumerate(prompts)]


@dataclass(frozen=True)
class _Request:
    """What `decode` is asked for; see there."""

    base: BaseModel
    max_tokens: int
    stop_tokens: list[int]
    before_step: Callable[[], None]
    sampler: Callable[[int], Sampler] | None
    with_end: bool


class _BatchError(Exception):
    """Raised where mlx-lm fails on a batch; says how."""


def _decode_batches(
    request: _Request, prompts: Prompts, is_finished: Callable[[int, Sequence[int]], bool]
) -> list[list[int]]:
    """Continue all prompts; those of similar length together."""
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    generated: list[list[int]] = [[] for _ in prompts]
    steps = _batch_steps(
        request.base.model,
        [prompts[i] for i in by_length],
        [request.max_tokens] * len(prompts),
        request.stop_tokens,
        BATCH_SIZE,
        request.before_step,
        [request.sampler(i) for i in by_length] if request.sampler else None,
    )
    finished: list[int] | None = None
    with closing(steps):
        while True:
            try:
                step = steps.send(finished)
            except StopIteration:
                return generated
            finished = []
            for number, response in step:
                if response.finish_reason != "stop" or request.with_end:
                    generated[by_length[number]].append(response.token)
                if response.finish_reason is None and is_finished(by_length[number], generated[by_length[number]]):
                    finished.append(number)


def _batch_steps(
    model: nn.Module,
    prompts: Prompts,
    max_tokens: list[int],
    stop_tokens: list[int],
    size: int,
    before_step: Callable[[], None],
    samplers: list[Sampler] | None = None,
) -> Generator[list[tuple[int, Any]], list[int] | None, None]:
    """Yield what each step generates: the number of the prompt and mlx-lm's response. Numbers that are sent back are
    not continued.

    Raises:
        _BatchError: mlx-lm fails.
    """
    before_step()
    try:
        generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in stop_tokens],
            completion_batch_size=size,
            prefill_batch_size=size,
        )
    except Exception as error:
        raise _BatchError(_describe(error)) from error
    with closing(generator):
        numbers: dict[int, int] = {}
        finished: list[int] | None = None
        while True:
            try:
                if finished:
                    generator.remove([uid for uid, number in numbers.items() if number in finished])
                if not numbers:
                    uids = generator.insert([list(prompt) for prompt in prompts], max_tokens, samplers=samplers)
                    numbers = {uid: number for number, uid in enumerate(uids)}
                responses = generator.next_generated()
            except MemoryError:
                raise
            except Exception as error:  # caches that do not support batches raise all kinds of errors
                raise _BatchError(_describe(error)) from error
            if not responses:
                return
            before_step()
            finished = yield [(numbers[response.uid], response) for response in responses]


def _decode_one(
    request: _Request, number: int, prompt: Sequence[int], is_finished: Callable[[Sequence[int]], bool]
) -> list[int]:
    generated: list[int] = []
    sampler = request.sampler(number) if request.sampler else None
    with wired_limit(request.base.model, [generation_stream]):
        for token, _ in _steps(request.base, prompt, request.max_tokens, sampler):
            request.before_step()
            if token in request.stop_tokens:
                generated += [token] * request.with_end
                break
            generated.append(token)
            if is_finished(generated):
                break
    return generated


def _steps(
    base: BaseModel, prompt: Sequence[int], max_tokens: int, sampler: Sampler | None = None
) -> Iterator[tuple[int, mx.array]]:
    """Yield each token of mlx-lm's own generation with the log-probabilities of all; greedy without a `sampler`.

    Raises:
        ModelError: mlx-lm fails.
    """
    try:
        yield from generate_step(mx.array(list(prompt)), base.model, max_tokens=max_tokens, sampler=sampler)
    except MemoryError:
        raise
    except Exception as error:
        raise generation_error(base, error) from error


def generation_error(base: BaseModel, error: Exception) -> ModelError:
    """Return what tells that mlx-lm failed to generate with this model."""
    return ModelError(
        f"mlx-lm cannot generate with {base.model_path}, whose model_type is '{base.config.get('model_type')}': "
        f"{_describe(error)}. Its loss can be computed all the same; without answers: data.metric_rows=0."
    )


def why_not_in_batches(
    base: BaseModel,
    prompts: Prompts,
    max_tokens: int,
    before_step: Callable[[], None] = lambda: None,
    cache_probe: bool = True,
) -> str | None:
    """Return why batches are not used for this model, or None if they give what one prompt at a time gives.

    Raises:
        ModelError: mlx-lm cannot generate with this architecture.
    """
    probes = _probe_prompts(base, prompts, max_tokens)
    verified = CachedResult.of(
        "batches",
        {
            "base": base.content_hash,
            "prompts": [list(prompt) for prompt in probes],
            "blas": blas.identity(),
            "version": _PROBE_VERSION,
            **numeric_platform(),
        },
    )
    if cache_probe and verified.load() is not None:
        return None
    reason = _batch_difference(base, probes, before_step)
    if reason is None and cache_probe:
        verified.store({"agrees": True})
    return reason


def _probe_prompts(base: BaseModel, prompts: Prompts, max_tokens: int) -> list[Sequence[int]]:
    """Return the shortest, the longest and the median prompt.

    A prompt of one token is not padded, so that it proves nothing, and the shortest of the others is taken. Where an
    answer can grow beyond the model's attention window, the longest one is extended to just before its end.
    """
    by_length = sorted(prompts, key=len)
    shortest = next((prompt for prompt in by_length if len(prompt) > 1), by_length[0])
    median, longest = by_length[len(by_length) // 2], by_length[-1]
    reachable = [w for w in _windows(base) if len(longest) < w <= len(longest) + max_tokens]
    if reachable:
        length = max(reachable) - 1
        longest = (list(longest) * (length // len(longest) + 1))[:length]
    return [shortest, longest, median]


def _windows(base: BaseModel) -> set[int]:
    """Return the lengths of the model's attention windows, by its config and its caches."""
    found: set[int] = set()

    def collect(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                collect(str(key), item)
        elif type(value) is int and value > 1 and any(part in name for part in _WINDOW_NAMES):
            found.add(value)

    collect("", base.config)
    try:
        caches = list(make_prompt_cache(base.model))
    except Exception as error:
        raise generation_error(base, error) from error
    for cache in caches:
        for part in getattr(cache, "caches", [cache]):
            for name in ("max_size", "chunk_size"):
                collect("window", getattr(part, name, None))
    return found


def _batch_difference(base: BaseModel, prompts: list[Sequence[int]], before_step: Callable[[], None]) -> str | None:
    """Return how batches of these prompts differ from one prompt at a time, or None where they do not.

    Every prompt generates a given number of tokens: nothing ends an answer.
    """
    together: list[list[mx.array]] = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    try:
        for step in _batch_steps(base.model, prompts, list(_PROBE_TOKENS), [], _PROBE_PROMPTS - 1, before_step):
            for number, response in step:
                together[number].append(response.logprobs)
                tokens[number].append(response.token)
    except _BatchError as error:
        return f"mlx-lm fails on batches of this model ({error})"
    for number, prompt in enumerate(prompts):
        before_step()
        for position, (token, logprobs) in enumerate(_steps(base, prompt, _PROBE_TOKENS[number])):
            if position >= len(together[number]) or not _agree(together[number][position], logprobs):
                return "batches of this model give other answers than one prompt at a time"
            if token != tokens[number][position]:  # equally likely: what follows cannot be compared
                break
    return None


def _agree(first: mx.array, second: mx.array) -> bool:
    tolerance = _TOLERANCES.get(first.dtype, _HALF_PRECISION_TOLERANCE)
    first, second = first.astype(mx.float32), second.astype(mx.float32)
    equal = first == second  # tokens that a model rules out have infinite ones
    scale = mx.where(mx.isinf(second), 0, mx.abs(second)).max()
    difference = mx.where(equal, 0, mx.abs(first - second)).max()
    return bool((difference <= tolerance * mx.maximum(scale, 1e-6)).item())  # false where either is NaN


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(str(error))[:200]}".rstrip(".: ")
