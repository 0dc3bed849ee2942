"""Training on answers that are compared: DPO and its variants, and KTO."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from runner.backends.protocol import Backend, BackendBatch
from runner.config.schema import MethodConfig
from runner.data.token_set import TokenSet
from runner.models.dropout import dropout_key
from runner.models.lora import Params
from runner.training.evaluate import EvaluatedRows, EvaluationResult, evaluate
from runner.training.methods.answer_losses import ANSWER_LOSSES, Answers
from runner.training.methods.method import WeighedUpdate
from runner.training.train_state import Measures, TrainState
from runner.training.world import ALONE, World


class PreferenceMethod:
    """Implements `method.Method` for the losses of `answer_losses`, each a function of two answers' log-probabilities.

    An update computes these first, for all of its examples; they decide the weight of each answer's tokens.
    """

    def __init__(
        self,
        backend: Backend,
        config: MethodConfig,
        token_sets: Mapping[str, TokenSet],
        references: Callable[[str], np.ndarray] | None,
        *,
        has_dropout: bool,
        world: World = ALONE,
    ) -> None:
        """`token_sets` by split; `references` returns the reference's log-probability of each row of a split, None
        where it is taken for zero."""
        self._backend, self._config, self._token_sets = backend, config, token_sets
        self._references, self._has_dropout, self._world = references, has_dropout, world

    def weigh(self, state: TrainState, batches: Sequence[BackendBatch]) -> WeighedUpdate:
        """Return the batches with each answer's tokens weighted by the derivative of the mean loss, to which the
        examples of all ranks contribute."""
        update = state.progress.step + 1
        log_probs = []
        for index, batch in enumerate(batches):
            key = dropout_key(state.seed, update, index, self._world.rank)
            losses = self._backend.token_losses(state.params, batch, key)
            log_probs.append(-batch.batch.sums_by_row(losses))
        by_rank = self._world.gather_arrays(
            np.concatenate([np.zeros(0, np.int64), *(batch.batch.rows for batch in batches)]),
            np.concatenate([np.zeros(0, np.int64), *(batch.batch.supervised_by_row for batch in batches)]),
            np.concatenate([np.zeros(0), *log_probs]),
        )
        losses, measures, derivatives = self._losses("train", *map(np.concatenate, by_rank))
        weighted, start = [], sum(map(len, by_rank[0][: self._world.rank]))
        for batch in batches:
            stop = start + batch.row_count
            # The loss of a token is its negative log-probability.
            found = batch.weighted(-derivatives[start:stop][batch.batch.target_rows])
            kept = found if self._has_dropout else found.without_unweighted_rows()  # masks depend on the shape
            weighted += [kept] if kept is not None else []
            start = stop
        return WeighedUpdate(
            weighted,
            supervised=sum(batch.supervised for batch in batches),
            tokens=sum(batch.real_tokens for batch in batches),
            loss=float(losses.mean()),
            examples=len(losses),
            measures=measures,
        )

    def evaluate(
        self, params: Params, split: str, batches: Iterable[BackendBatch], before_batch: Callable[[], None]
    ) -> EvaluationResult:
        """Return the mean loss over the examples of `batches`, and what is measured beside it."""
        start = time.perf_counter()
        found = evaluate(self._backend, params, batches, before_batch, self._world)
        losses, measures, _ = self._losses(split, found.rows.indices, found.rows.tokens, -found.rows.losses)
        return EvaluationResult(
            loss=float(losses.mean()) if len(losses) else 0.0,
            supervised=found.supervised,
            tokens=found.tokens,
            seconds=time.perf_counter() - start,
            rows=EvaluatedRows(found.rows.indices[::2], losses, np.ones(len(losses), np.int64)),
            measures={name: total / count for name, (total, count) in measures.items() if count},
        )

    def identity(self, fingerprint: str) -> str:
        """Return the fingerprint of evaluated rows: their losses are those of this method."""
        return hashlib.sha256(f"{self._config.name} {fingerprint}".encode()).hexdigest()

    def _losses(
        self, split: str, rows: np.ndarray, tokens: np.ndarray, log_probs: np.ndarray
    ) -> tuple[np.ndarray, Measures, np.ndarray]:
        """Return the loss of each example, what is measured, and the derivative of the mean loss by each row's
        log-probability, (rows,); examples are pairs of neighbouring `rows`, with so many supervised `tokens`."""
        loss = ANSWER_LOSSES[self._config.name]
        # Sums over hundreds of tokens are subtracted from each other: in float64, which only the CPU computes.
        with mx.stream(mx.cpu):
            answers = Answers(
                tokens=_pairs(tokens.astype(np.float64)),
                reference=_pairs(self._references(split)[rows] if self._references else np.zeros(len(rows))),
                unwanted=mx.array(self._token_sets[split].unwanted[rows].reshape(-1, 2)),
            )

            def mean_loss(values: mx.array) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
                losses, measured = loss(values, answers, self._config)
                return losses.mean(), losses, measured

            (_, losses, measured), derivatives = mx.value_and_grad(mean_loss)(_pairs(log_probs))
            mx.eval(losses, measured, derivatives)
        measures: Measures = {}
        for name, array in measured.items():
            values = np.array(array)
            applies = ~np.isnan(values)
            measures[name] = (math.fsum(values[applies]), int(applies.sum()))
        return np.array(losses), measures, np.array(derivatives).reshape(-1)


def _pairs(values: np.ndarray) -> mx.array:
    return mx.array(values.reshape(-1, 2), mx.float64)
