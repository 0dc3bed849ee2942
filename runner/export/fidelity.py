"""Check an export: load it again and compare, on validation rows, what it computes with what the run computes.

What an adapter does is how it changes the loss of each row. An export is faithful where it changes the losses of the
same rows by the same amounts; the deviation is the root mean square of the differences, relative to that of the run's
changes: 0 is the run itself, 1 an export that computes what the base model does. The mean loss alone would not show an
export whose rounding helps some rows and harms others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from runner.backends.select import select_backend
from runner.common.errors import DataError, RunnerError
from runner.config.schema import Config, LoraConfig
from runner.data.order import evaluation_batches
from runner.data.source import find_sources
from runner.data.token_set import TokenSet
from runner.data.tokenize import TokenizedDataset, load_data
from runner.models.load import BaseModel
from runner.models.lora import AdaptedModel, Params
from runner.training.dataloader import BatchBuilder, EvaluationLoader
from runner.training.evaluate import evaluate
from runner.training.generate import answer_rows

DEFAULT_ROWS = 64
EXACT_LIMIT = 0.01
"""Largest deviation of an export that holds the adapter's own numbers, or weights of 32 bits: only the order of
additions differs, which moves a loss by less than a thousandth of what an adapter that learned anything does."""
HALF_LIMIT = 0.05
"""Largest deviation of an export whose weights are rounded to 16 bits."""
ROUNDED_LIMIT = 0.25
"""Largest deviation of an export whose weights are quantized. The 4-bit models that were measured (docs/export.md) lie
far below it where the adapter has trained to an effect."""
_NOISE = 1e-5
"""Distance of losses, in nats a token, that the order of additions in 32 bits may cause: no deviation."""
_NO_EFFECT = 1e-6
"""Mean change of a row's loss, in nats a token, below which an adapter does nothing: it is at its start."""
_NO_EFFECT_LIMIT = 0.02
"""Largest change of a row's loss, in nats a token, by an export of an adapter that does nothing."""


def limit_of(types: Iterable[str]) -> float:
    """Return the largest deviation of an export whose weights have these `types`, of which the coarsest counts."""
    limits = {"f32": EXACT_LIMIT, "float32": EXACT_LIMIT} | dict.fromkeys(
        ("f16", "bf16", "float16", "bfloat16"), HALF_LIMIT
    )
    return max((limits.get(name, ROUNDED_LIMIT) for name in types), default=EXACT_LIMIT)


class ExportError(RunnerError):
    """Raised for an export that does not compute what the run does, or that cannot be compared with it."""


@dataclass(frozen=True)
class LossesByRow:
    """The losses of the rows that are compared, in nats."""

    sums: np.ndarray
    """(rows,): the sum of -log p over a row's supervised tokens."""
    tokens: np.ndarray
    """(rows,): the number of these tokens."""

    @property
    def mean(self) -> float:
        """The mean over the supervised tokens of all rows."""
        return float(self.sums.sum() / self.tokens.sum())

    def distance(self, other: LossesByRow) -> float:
        """Return the root mean square, over tokens, of the differences of the rows' mean losses."""
        differences = (self.sums - other.sums) / self.tokens
        return math.sqrt(float((self.tokens * differences**2).sum() / self.tokens.sum()))


@dataclass(frozen=True)
class Measured:
    """What a model computes on the rows that are compared."""

    losses: LossesByRow
    score: float | None = None
    """Mean score of the data set's metric; None where it has none."""
    answers: int = 0
    """Number of rows whose answers were scored."""


@dataclass(frozen=True)
class FidelityCheck:
    """How an export compares with its run."""

    base: LossesByRow
    run: Measured
    export: Measured
    limit: float
    """Largest deviation that passes."""

    @property
    def effect(self) -> float:
        """By how much the adapter changes the loss of a row, in nats a token."""
        return self.run.losses.distance(self.base)

    @property
    def deviation(self) -> float:
        """The export's distance from the run, relative to the adapter's effect."""
        distance = self.export.losses.distance(self.run.losses)
        return distance / self.effect if self.effect > _NO_EFFECT else distance / _NO_EFFECT_LIMIT * self.limit

    @property
    def passes(self) -> bool:
        """Whether the export computes what the run does."""
        is_noise = self.export.losses.distance(self.run.losses) <= _NOISE
        return is_noise or self.deviation <= self.limit  # not where it is NaN

    def problem(self, name: str = "run") -> str:
        """Return what is wrong with an export that does not pass; `name` is that of what is exported."""
        if not math.isfinite(self.export.losses.mean):
            return "its loss is not finite"
        if self.effect <= _NO_EFFECT:
            return "the adapter changes nothing, and the export computes something else than its base model"
        lost = self.export.losses.distance(self.base) < 0.5 * self.effect
        what = "the adapter's effect is lost" if lost else "the adapter's effect is damaged"
        deviates = f"it deviates from the {name} by {self.deviation:.1%} of that effect"
        return f"{what}: {deviates}, and {self.limit:.0%} is allowed"


class FidelityRows:
    """The rows on which a run and its exports are compared: a sample of the validation split."""

    def __init__(self, config: Config, base: BaseModel, count: int, log: Callable[[str], None]) -> None:
        """Load and tokenize the rows: `count` of all lengths, all if negative; of the test split, then the training
        split, where there is no validation split.

        Raises:
            DataError: the data set cannot be read.
        """
        self.config = copy.deepcopy(config)
        self.config.train.hidden_cache.enabled = False  # each model is evaluated once
        self.config.train.grad_checkpoint = False
        self._log = log
        data, self.split = _load_rows(self.config, base)
        self._data = data
        self._rows: TokenSet = getattr(data, self.split).grouped(1)
        self._selected = np.concatenate(evaluation_batches(self._rows.lengths, 1, count))
        self._answers = 0
        self._known: tuple[Params, Measured] | None = None
        if config.data.metric and config.data.metric_rows and config.data.metric_split in data.parts:
            wanted = config.data.metric_rows
            self._answers = wanted if count < 0 else min(wanted, count) if wanted > 0 else count

    @property
    def row_count(self) -> int:
        """Number of rows whose losses are compared."""
        return len(self._selected)

    def texts(self, count: int) -> list[str]:
        """Return the texts of up to `count` of the rows, special tokens included."""
        return [self._data.decode(self._rows.row(int(row))[0]) for row in self._selected[:count]]

    def losses(self, adapted: AdaptedModel, params: Params) -> LossesByRow:
        """Return the losses of the model with the adapter `params`."""
        backend = select_backend(adapted, self.config, int(self._rows.lengths[self._selected].max()))
        size = self.config.train.batch_size
        batches = [self._selected[start : start + size] for start in range(0, len(self._selected), size)]
        loader = EvaluationLoader(BatchBuilder(self._rows, self.config.data.pad_to), batches)
        rows = evaluate(backend, params, loader).rows
        return LossesByRow(rows.losses, rows.tokens)

    def measure(self, adapted: AdaptedModel, params: Params) -> Measured:
        """Return losses and score of the model with the adapter `params`.

        Arrays that equal those of the first call bit for bit give the same answers, which are not generated again.
        """
        losses = self.losses(adapted, params)
        if self._known is not None and _equal(params, self._known[0]):
            return replace(self._known[1], losses=losses)
        adapted.place(params)
        measured = Measured(losses, *self._score(adapted.base))
        self._known = self._known or (params, measured)
        return measured

    def measure_model(self, base: BaseModel) -> Measured:
        """Return losses and score of a model without an adapter, such as a fused one."""
        adapted = AdaptedModel(base, LoraConfig(rank=1, num_layers=1), seed=0)  # B is zero: it does nothing
        try:
            return self.measure(adapted, adapted.params())
        finally:
            adapted.remove()

    def _score(self, base: BaseModel) -> tuple[float | None, int]:
        if not self._answers:
            return None, 0
        rows = self._data.first_rows(self.config.data.metric_split, self._answers)
        return answer_rows(base, rows, self.config, log=self._log).score, len(rows)


def _equal(first: Params, second: Params) -> bool:
    return first.keys() == second.keys() and all(mx.array_equal(first[name], second[name]).item() for name in first)


def _load_rows(config: Config, base: BaseModel) -> tuple[TokenizedDataset, str]:
    available = {split for source in find_sources(config.data) for split in source.find_files()}
    splits = ["valid", "test", "train"] if "valid" in available else ["test", "valid", "train"]
    split = next((name for name in splits if name in available), None)
    if config.data.valid_fraction is not None and "valid" not in available:
        split = "valid"
    if split is None:
        raise DataError(f"{config.data.path} has no rows.")
    wanted = {split} | ({config.data.metric_split} & available if config.data.metric_rows else set())
    return load_data(config, base.lazy_tokenizer, tuple(sorted(wanted))), split
