"""A member: one trainable adapter and all that belongs to it. A plain run has one; all members share the batches."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from runner.checkpoints.save_policy import SaveTimer
from runner.models.lora import Params
from runner.training.optimizer import Optimizer

if TYPE_CHECKING:
    from runner.training.run_writer import RunWriter

T = TypeVar("T")
_LARGEST = 1 << 62


@dataclass
class ReportWindow:
    """Sums since the last report."""

    loss_sum: float = 0.0
    supervised: int = 0
    tokens: int = 0
    updates: int = 0
    grad_norm: float | None = None
    """Of the last update, before clipping."""


@dataclass
class Progress:
    """Where a member stands: with its arrays, all that the next update depends on. Stored in train_state.json."""

    step: int = 0
    """Updates made."""
    tokens: int = 0
    """Real tokens (no padding) trained on."""
    window: ReportWindow = field(default_factory=ReportWindow)
    best_step: int | None = None
    best_loss: float | None = None
    """Lowest validation loss of a step above 0, and that step."""
    baseline_loss: float | None = None
    """Validation loss before the first update."""
    valid_loss: float | None = None
    """Last validation loss."""
    valid_step: int | None = None
    """Update of the last evaluation."""
    bad_evaluations: int = 0
    """Evaluations in a row that did not beat the best."""
    train_loss: float | None = None
    """Last reported training loss."""
    pending_evaluation: bool = False
    """An evaluation was due at this step and a stop came first: it is the first thing after the resume."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for train_state.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Progress:
        """The reverse of `to_dict`.

        Raises:
            TypeError: an unknown field, or a value of another type than it has.
        """
        return _checked(cls(**{**data, "window": _checked(ReportWindow(**data["window"]))}))


def _checked(read: T) -> T:
    """`read`, every value of which is of its type; whole numbers are counts, so from 0."""
    hints = typing.get_type_hints(type(read))
    for name, hint in hints.items():
        value, kinds = getattr(read, name), typing.get_args(hint) or (hint,)
        right = type(value) in kinds or (type(value) is int and float in kinds)
        if not right or (type(value) is int and not 0 <= value < _LARGEST):
            raise TypeError(f"{name} is not what it has to be ({getattr(hint, '__name__', hint)})")
    return read


@dataclass
class TrainState:
    """One adapter in training."""

    params: Params
    optimizer: Optimizer
    learning_rate: Callable[[int], float]
    """Of the update, counted from 1."""
    seed: int
    record: RunWriter
    """The files it writes."""
    progress: Progress = field(default_factory=Progress)
    train_seconds: float = 0.0
    """Of the report window; evaluation and saving not counted."""
    since_save: SaveTimer = field(default_factory=SaveTimer)
