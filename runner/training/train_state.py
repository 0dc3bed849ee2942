"""The state of training: everything that, with the config and the data, decides the rest of a run."""

from __future__ import annotations

import typing
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from runner.common import safe_json
from runner.config.schema import Config
from runner.data.order import DataPosition
from runner.models.lora import Params
from runner.training.optimizer import Optimizer, build_optimizer
from runner.training.weight_average import WeightAverage

T = TypeVar("T")


Measures = dict[str, tuple[float, int]]
"""What a method measures beside its loss, such as rewards: name to the sum over examples, and their number."""


@dataclass(frozen=True)
class UpdateResult:
    """What one update computed."""

    loss_sum: float
    """The loss summed over the supervised tokens, or over the examples of a method that has any."""
    supervised: int
    tokens: int
    """Tokens without padding."""
    examples: int
    """Examples that the loss is a mean over; 0 where it is one over tokens."""
    measures: Measures
    grad_norm: float
    """Norm of the gradient of the mean loss, before clipping."""

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.loss_sum / (self.examples or self.supervised)


@dataclass
class ReportWindow:
    """Sums over the updates since the last report of the training loss."""

    loss_sum: float = 0.0
    supervised: int = 0
    tokens: int = 0
    updates: int = 0
    grad_norm: float | None = None
    """Gradient norm of the last update, before clipping."""
    examples: int = 0
    measures: dict[str, Any] = field(default_factory=dict)
    """As `Measures`, with lists for JSON."""

    def add(self, result: UpdateResult) -> None:
        """Add one update."""
        self.loss_sum += result.loss_sum
        self.supervised += result.supervised
        self.tokens += result.tokens
        self.examples += result.examples
        self.updates += 1
        self.grad_norm = result.grad_norm
        for name, (total, count) in result.measures.items():
            before = self.measures.get(name, [0.0, 0])
            self.measures[name] = [before[0] + total, before[1] + count]

    @property
    def loss(self) -> float:
        """The mean loss."""
        return self.loss_sum / (self.examples or self.supervised)

    def means(self) -> dict[str, float]:
        """Return the mean of each measure."""
        return {name: total / count for name, (total, count) in self.measures.items() if count}


@dataclass
class Progress:
    """The counters and losses of a run; stored in train_state.json."""

    step: int = 0
    """Optimizer updates made."""
    tokens: int = 0
    """Real tokens (without padding) trained on."""
    since_report: ReportWindow = field(default_factory=ReportWindow)
    best_step: int | None = None
    best_loss: float | None = None
    """Lowest validation loss after the first update, and the step it was measured at."""
    baseline_loss: float | None = None
    """Validation loss before the first update."""
    valid_loss: float | None = None
    """Last validation loss."""
    valid_step: int | None = None
    """Step of the last validation."""
    bad_evaluations: int = 0
    """Consecutive evaluations that did not improve on the best loss."""
    train_loss: float | None = None
    """Last reported training loss."""
    skipped_updates: int = 0
    """Updates, of `step`, that were not applied because their loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """The last of these, since an update was applied."""
    pending_evaluation: bool = False
    """A stop prevented the evaluation that was due at this step; the resumed run starts with it."""

    def add_validation(self, loss: float, min_delta: float) -> bool:
        """Record the validation loss of the current step; return whether it is the best so far.

        Any lower loss is the best. Early stopping counts an evaluation as bad unless the loss falls by more than
        `min_delta`. The loss before the first update is the baseline and never the best.
        """
        self.valid_loss, self.valid_step = loss, self.step
        if self.step == 0:
            self.baseline_loss = loss
            return False
        improved = self.best_loss is None or loss < self.best_loss - min_delta
        self.bad_evaluations = 0 if improved else self.bad_evaluations + 1
        is_best = self.best_loss is None or loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step = loss, self.step
        return is_best

    @property
    def current_valid_loss(self) -> float | None:
        """The validation loss of the current step; None if this step was not evaluated."""
        return self.valid_loss if self.valid_step == self.step else None

    @property
    def best(self) -> dict[str, float | int] | None:
        """The best evaluation as status.json has it."""
        if self.best_step is None or self.best_loss is None:
            return None
        return {"step": self.best_step, "valid_loss": self.best_loss}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for train_state.json, which names the sums since the last report `window`."""
        return {"window" if name == "since_report" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Progress:
        """Return the progress that `to_dict` wrote.

        Raises:
            TypeError: an unknown field, or a value of a wrong type.
        """
        fields = {**data}
        since_report = ReportWindow(**fields.pop("window"))
        return _checked(cls(since_report=_checked(since_report), **fields))


@dataclass
class TrainState:
    """Weights, optimizer state, progress and data position of a run, and its seed."""

    params: Params
    """The weights after the last update, which the next one changes."""
    optimizer: Optimizer
    seed: int
    average: WeightAverage | None = None
    """With weight averaging, the mean of `params` so far."""
    progress: Progress = field(default_factory=Progress)
    position: DataPosition = field(default_factory=DataPosition)
    """Where in the training data the next update begins."""

    @classmethod
    def begin(cls, config: Config, params: Params) -> TrainState:
        """Return the state of a new run of `config` with the adapter `params`."""
        state = cls(params, build_optimizer(config, params), config.seed)
        if config.train.averaging_power is not None:
            state.average = WeightAverage(config.train.averaging_power, state.optimizer.layout)
        return state

    @property
    def adapter(self) -> Params:
        """The weights to evaluate, and those of the result: the mean, or without averaging `params`."""
        average = None if self.average is None else self.average.params()
        return self.params if average is None else average


def _checked(instance: T) -> T:
    """Return `instance` if each field has its declared type; integers must be counts, from 0."""
    hints = typing.get_type_hints(type(instance))
    for name, hint in hints.items():
        value = getattr(instance, name)
        if name == "measures":
            _check_measures(value)
            continue
        types = typing.get_args(hint) or (hint,)
        valid = type(value) in types or (type(value) is int and float in types)
        if not valid or (type(value) is int and not safe_json.is_count(value)):
            raise TypeError(f"{name} is invalid: must be {getattr(hint, '__name__', hint)}")
    return instance


def _check_measures(measures: Any) -> None:
    valid = isinstance(measures, dict) and all(
        isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (int, float) and safe_json.is_count(pair[1])
        for pair in measures.values()
    )
    if not valid:
        raise TypeError("measures is invalid: must be names with a sum and a count")
