"""The metrics of an objective and their directions, from the values of objective.metric and objective.direction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from runner.common.text import shorten
from runner.config.training_sections import HIGHER_IS_BETTER, METHOD_MEASURES, ObjectiveConfig

if TYPE_CHECKING:
    from runner.config.schema import Config

MAXIMIZE = "maximize"


def metrics_of(metric: Any) -> tuple[str, ...]:
    """Return the metrics that a value of objective.metric names, the first one first; the default where it is none."""
    named = metric if isinstance(metric, list) else [metric]
    found = tuple(dict.fromkeys(name for name in named if isinstance(name, str)))
    return found or (ObjectiveConfig().metric,)


def directions_of(metric: Any, direction: Any) -> tuple[bool, ...]:
    """Return for each of the metrics whether a higher value is better.

    `direction` is the value of objective.direction: a single one is that of the first metric.
    """
    typed = direction if isinstance(direction, list) else [direction]
    directions = [*typed, *([None] * len(metrics_of(metric)))]
    return tuple(
        name in HIGHER_IS_BETTER if wanted is None else wanted == MAXIMIZE
        for name, wanted in zip(metrics_of(metric), directions, strict=False)
    )


def objective_problems(config: Config) -> Iterator[str]:
    """Check what the metrics need, and that each has a direction where a list of these is given."""
    metric, direction, method = config.objective.metric, config.objective.direction, config.method.name
    metrics = metrics_of(metric)
    if isinstance(metric, list) and len(metrics) < len(metric):
        yield f"objective.metric={shorten(metric)} names a metric twice."
    if "test_loss" in metrics and not config.train.test:
        yield "objective.metric=test_loss needs train.test=true."
    if "score" in metrics and not config.data.metric_rows:
        yield "objective.metric=score needs data.metric_rows."
    if "reward_accuracy" in metrics and "reward_accuracy" not in METHOD_MEASURES.get(method, ()):
        names = ", ".join(name for name, measures in METHOD_MEASURES.items() if "reward_accuracy" in measures)
        yield f"objective.metric=reward_accuracy is not measured by method={method}: {names} do."
    if direction is not None and len(metrics) != (len(direction) if isinstance(direction, list) else 1):
        yield (
            f"objective.direction={shorten(direction)} is invalid: must be null, or a list with one direction "
            f"for each metric of [{','.join(metrics)}]."
        )
