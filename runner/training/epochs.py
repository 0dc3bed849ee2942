"""train.epochs: the number of updates that a number of passes over the training rows takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from runner.common.errors import ConfigError
from runner.config import validation
from runner.config.schema import Config
from runner.config.serialize import change_dict
from runner.runs.run_spec import RunSpec
from runner.training.component_loader import ComponentLoader


def updates_of(epochs: float, rows: int, batch_size: int, accumulation: int) -> int:
    """Return the number of updates in which every row comes `epochs` times; a last update may begin the next pass."""
    batches = -(-rows // batch_size)
    return max(1, math.ceil(Fraction(str(epochs)) * batches / accumulation))


def fill_iters(spec: RunSpec, loader: ComponentLoader, check_stop: Callable[[], None], done: int = 0) -> RunSpec:
    """Return `spec` with train.iters computed from train.epochs and the data, unless train.epochs is null.

    Args:
        done: updates that the run has made already.

    Raises:
        ConfigError: the number does not fit the schedule, or the run is beyond it.
        ModelError, DataError: model or data cannot be loaded.
    """
    train = spec.config.train
    if train.epochs is None:
        return spec
    data = loader.data(spec.config, loader.base(spec.config.model, spec.precision), check_stop)
    iters = updates_of(train.epochs, data.train.example_count, train.batch_size, train.grad_accumulation)
    if iters < done:
        raise ConfigError(f"train.epochs={train.epochs:g} ends at update {iters}, before update {done} of the run.")
    validation.validate(replace(spec.config, train=replace(train, epochs=None, iters=iters)))
    stored = change_dict(spec.stored, {"train.iters": iters})
    return replace(spec, config=replace(spec.config, train=replace(train, iters=iters)), stored=stored)


def describe(config: Config, rows: int) -> str:
    """Return the line of the log about the length of the run."""
    train = config.train
    return (
        f"train  {train.epochs:g} epochs of {rows:,} rows are {train.iters:,} updates of "
        f"{train.batch_size * train.grad_accumulation} rows"
    )
