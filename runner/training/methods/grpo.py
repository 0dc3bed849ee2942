"""Group relative policy optimization (Shao et al., arXiv:2402.03300): answers are sampled, scored by the metric of the
data, and compared with the other answers to the same prompt.

Each answer is used for one update, by the weights that sampled it. So the probability ratio of the method is 1, and its
clipping has nothing to do; the gradient is that of the advantage times the log-probability.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from runner.backends.protocol import Backend, BackendBatch
from runner.config.schema import Config
from runner.data.batch import Batch, collate
from runner.data.length_buckets import LengthBuckets
from runner.data.metrics import METRICS
from runner.data.text_encoder import TextEncoder
from runner.data.token_set import TokenSet
from runner.data.tokenize import TokenizedDataset
from runner.models.dropout import dropout_key
from runner.models.lora import AdaptedModel, Params
from runner.training.decoding import Sampler, decode, why_not_in_batches
from runner.training.evaluate import EvaluatedRows, EvaluationResult
from runner.training.generate import Question, generate, split_row
from runner.training.methods.method import WeighedUpdate
from runner.training.signals import StopRequested
from runner.training.train_state import TrainState
from runner.training.world import ALONE, World

_STD_FLOOR = 1e-4
"""Added to the standard deviation of a group's rewards, as in TRL."""
_PROBE_PROMPTS = 32


@dataclass(frozen=True)
class _Prompt:
    row: Mapping[str, Any]
    question: Question


class GroupMethod:
    """Implements `method.Method`; the batches name prompts, of which the model's own answers are trained on."""

    def __init__(
        self,
        adapted: AdaptedModel,
        backend: Backend,
        config: Config,
        data: TokenizedDataset,
        reference: Callable[[], Params],
        check_stop: Callable[[], None],
        log: Callable[[str], None],
        world: World = ALONE,
    ) -> None:
        """`reference` returns the adapter before training; called only with method.beta above 0."""
        assert config.data.metric is not None
        self._adapted, self._backend, self._config, self._data = adapted, backend, config, data
        self._metric, self._reference = METRICS[config.data.metric], reference
        self._check_stop, self._log, self._world = check_stop, log, world
        self._encoder = TextEncoder(adapted.base.tokenizer, data.options.template)
        self._rows: dict[str, dict[int, dict[str, Any]]] = {}
        self._in_batches: bool | None = None
        self._reference_params: Params | None = None

    def weigh(self, state: TrainState, batches: Sequence[BackendBatch]) -> WeighedUpdate:
        """Return sampled answers to the prompts of `batches`, their tokens weighted by the advantages.

        Raises:
            StopRequested: a stop signal arrived, here or on another rank.
        """
        method, update, size = self._config.method, state.progress.step + 1, int(self._config.method.group_size or 0)
        prompts = [self._prompt("train", row) for batch in batches for row in batch.batch.rows]
        answers, abandoned = [], False
        try:
            answers = self._sample(state, prompts, update)
        except StopRequested:
            abandoned = True
        scores = np.array(
            [self._score(prompt, answer) for prompt, group in zip(prompts, answers, strict=False) for answer in group]
        )
        lengths = np.array([len(answer) for group in answers for answer in group], np.int64)
        by_rank = self._world.gather_arrays(scores, lengths, abandoned=abandoned)
        # Of the answers of all ranks, (prompts, answers); those of this one begin at `start`.
        scores, lengths = (np.concatenate(arrays).reshape(-1, size) for arrays in by_rank)
        start = sum(map(len, by_rank[0][: self._world.rank])) // size
        advantages = group_advantages(scores, scale=bool(method.scale_rewards))
        factors = token_factors(lengths, str(method.loss_type), int(method.max_new_tokens or 0))
        sampled: list[BackendBatch] = []
        weighted: list[BackendBatch] = []
        divergence, first = 0.0, start
        for index, given in enumerate(batches):
            own = slice(start, start + given.row_count)
            local = slice(own.start - first, own.stop - first)
            batch = _batch_of_answers(prompts[local], answers[local])
            rows, key = batch.batch.target_rows, dropout_key(state.seed, update, index, self._world.rank)
            weights, kl = self._token_weights(state, batch, key, advantages[own].reshape(-1)[rows])
            divergence += float(kl.sum())
            found = batch.weighted(weights * factors[own].reshape(-1)[rows])
            kept = found if self._config.lora.dropout else found.without_unweighted_rows()
            weighted += [kept] if kept is not None else []
            sampled.append(batch)
            start = own.stop
        measures = {
            "reward": (float(scores.sum()), scores.size),
            "reward_std": (float(scores.std(axis=1, ddof=1).sum()), len(scores)),
            "answer_tokens": (float(lengths.sum()), lengths.size),
        }
        if method.beta:
            divergences = np.concatenate(self._world.gather_arrays(np.array([divergence]))[0])
            measures["kl"] = (float(divergences.sum()), int(lengths.sum()))
        return WeighedUpdate(
            weighted,
            supervised=int(lengths[first:start].sum()),
            tokens=sum(batch.real_tokens for batch in sampled),
            loss=1.0 - float(scores.mean()),
            examples=scores.size,
            measures=measures,
        )

    def evaluate(
        self, params: Params, split: str, batches: Iterable[BackendBatch], before_batch: Callable[[], None]
    ) -> EvaluationResult:
        """Return 1 minus the mean reward of the most likely answers.

        Raises:
            StopRequested: `before_batch` raised it, here or on another rank.
        """
        start = time.perf_counter()
        indices = np.sort(np.concatenate([np.zeros(0, np.int64), *(batch.batch.rows for batch in batches)]))
        prompts = [self._prompt(split, int(row)) for row in indices]
        self._adapted.place(params)
        scores, tokens, abandoned = [], 0, False
        try:
            if prompts:
                found = generate(
                    self._adapted.base,
                    [prompt.row for prompt in prompts],
                    self._data.options,
                    self._metric,
                    max_tokens=int(self._config.method.max_new_tokens or 0),
                    before_step=before_batch,
                    log=self._log,
                    cache_probe=self._config.train.cache_probes,
                )
                scores, tokens = [answer.score for answer in found.answers], found.tokens
        except StopRequested:
            abandoned = True
        by_rank = self._world.gather_arrays(
            indices, np.array(scores, np.float64), np.array([tokens]), abandoned=abandoned
        )
        indices, all_scores, all_tokens = map(np.concatenate, by_rank)
        order = np.argsort(indices, kind="stable")
        losses = 1.0 - all_scores[order]
        return EvaluationResult(
            loss=float(losses.mean()) if len(losses) else 0.0,
            supervised=int(all_tokens.sum()),
            tokens=int(all_tokens.sum()),
            seconds=time.perf_counter() - start,
            rows=EvaluatedRows(indices[order], losses, np.ones(len(losses), np.int64)),
            measures={"reward": sum(all_scores[order].tolist()) / max(1, len(losses))},
        )

    def identity(self, fingerprint: str) -> str:
        """Return the fingerprint of evaluated rows: their losses are 1 minus the reward."""
        return hashlib.sha256(f"{self._config.data.metric} {fingerprint}".encode()).hexdigest()

    def _prompt(self, split: str, row: int) -> _Prompt:
        if split not in self._rows:
            self._rows[split] = self._data.rows_by_location(split)
        found = self._rows[split][int(getattr(self._data, split).lines[row])]
        return _Prompt(found, split_row(found, self._encoder, self._data.options))

    def _sample(self, state: TrainState, prompts: list[_Prompt], update: int) -> list[list[list[int]]]:
        """Return the tokens of `group_size` answers to each prompt, with the one that ends an answer."""
        method, base, world = self._config.method, self._adapted.base, self._world
        assert method.group_size is not None and method.max_new_tokens is not None
        if not prompts:
            return []
        size = method.group_size
        self._adapted.place(state.params)
        base.model.eval()
        if self._in_batches is None:
            self._in_batches = self._answers_in_batches(method.max_new_tokens)
        keyed = KeyedSampler(state.seed, update)

        def sampler(number: int) -> Sampler:
            """Return the sampler of an answer by its number here: prompts of an update are dealt to the ranks."""
            prompt, answer = divmod(number, size)
            return keyed((world.rank + prompt * world.size) * size + answer)

        found = decode(
            base,
            [prompt.question.prompt_tokens for prompt in prompts for _ in range(method.group_size)],
            method.max_new_tokens,
            before_step=self._check_stop,
            log=self._log,
            in_batches=self._in_batches,
            sampler=sampler,
            with_end=True,
        )
        return [found[start : start + size] for start in range(0, len(found), size)]

    def _answers_in_batches(self, max_tokens: int) -> bool:
        """Return whether batches give what one prompt at a time gives: tried once, on the first prompts of the data."""
        count = min(_PROBE_PROMPTS, len(self._data.train))
        prompts = [self._prompt("train", row).question.prompt_tokens for row in range(count)]
        reason = why_not_in_batches(
            self._adapted.base, prompts, max_tokens, self._check_stop, self._config.train.cache_probes
        )
        if reason is not None:
            self._log(f"answers are sampled one at a time: {reason}")
        return reason is None

    def _score(self, prompt: _Prompt, answer: list[int]) -> float:
        ends = self._adapted.base.tokenizer.eos_token_ids
        text = self._adapted.base.tokenizer.decode(answer[:-1] if answer[-1] in ends else answer)
        return self._metric.score({**prompt.row, "completion": prompt.question.expected}, text)

    def _token_weights(
        self, state: TrainState, batch: BackendBatch, key: mx.array, advantages: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return what each token's loss counts, and its estimate of the KL divergence from the reference."""
        beta = self._config.method.beta
        if not beta:
            return advantages, np.zeros(len(advantages))
        if self._reference_params is None:
            self._reference_params = self._reference()
        losses = self._backend.token_losses(state.params, batch, key).astype(np.float64)
        reference = self._backend.token_losses(self._reference_params, batch, key).astype(np.float64)
        ratio = losses - reference  # log of the reference's probability over the model's
        # Schulman's estimator exp(r) - r - 1. Its derivative by the model's log-probability, 1 - exp(r), is not that of
        # the divergence, because the model samples the answers. Times the probability ratio, which is 1 but has a
        # derivative, it is: -r (DeepSeek-V3.2, arXiv:2512.02556).
        return advantages + beta * ratio, np.exp(ratio) - ratio - 1


class KeyedSampler:
    """Samples the tokens of answers from the model's own probabilities (another temperature would be another policy
    than the trained one), with random numbers that depend on the seed, the update, the answer's number and the
    position alone, so that a resumed run samples the same."""

    def __init__(self, seed: int, update: int) -> None:
        self._stream = f"answers {seed} {update}"

    def __call__(self, number: int) -> Sampler:
        """Return the sampler of answer `number`: log-probabilities (1, vocabulary) to a token, (1,)."""
        digest = hashlib.blake2b(f"{self._stream} {number}".encode(), digest_size=8).digest()
        key = mx.random.key(int.from_bytes(digest, "big"))

        def sample(log_probs: mx.array) -> mx.array:
            nonlocal key
            key, own = mx.random.split(key)
            return mx.random.categorical(log_probs, key=own)

        return sample


def group_advantages(scores: np.ndarray, *, scale: bool) -> np.ndarray:
    """Return the rewards (prompts, answers) less the mean of their prompt, divided by its standard deviation where
    `scale`."""
    advantages = scores - scores.mean(axis=1, keepdims=True)
    return advantages / (scores.std(axis=1, ddof=1, keepdims=True) + _STD_FLOOR) if scale else advantages


def token_factors(lengths: np.ndarray, loss_type: str, max_tokens: int) -> np.ndarray:
    """Return what a token of each answer counts in the mean over an update; `lengths` (prompts, answers) in tokens."""
    if loss_type == "grpo":
        return 1.0 / (lengths * lengths.size)
    return np.full(lengths.shape, 1.0 / (lengths.sum() if loss_type == "dapo" else lengths.size * max_tokens))


def _batch_of_answers(prompts: list[_Prompt], answers: list[list[list[int]]]) -> BackendBatch:
    rows = [
        (prompt.question.prompt_tokens, answer)
        for prompt, group in zip(prompts, answers, strict=True)
        for answer in group
    ]
    tokens = np.concatenate([np.array([*start, *answer], np.int32) for start, answer in rows])
    supervised = np.concatenate([np.repeat([False, True], [len(start), len(answer)]) for start, answer in rows])
    lengths = [len(start) + len(answer) for start, answer in rows]
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    token_set = TokenSet(tokens, supervised, offsets, np.arange(len(rows), dtype=np.int64))
    batch: Batch = collate(token_set, np.arange(len(rows)), LengthBuckets.from_lengths(token_set.lengths, None))
    return BackendBatch(batch)
