"""Which rows `runner test` measures and answers."""

from __future__ import annotations

from runner.cli.commands.stored_settings import StoredSettings
from runner.common.errors import ConfigError, DataError
from runner.config.schema import Config
from runner.data.source import find_sources


def require_split(settings: StoredSettings, split: str) -> None:
    """Let an evaluation cover all rows of the split, unless train.eval_batches was typed.

    Raises:
        DataError: the data has no such split.
    """
    data = settings.config.data
    if "train.eval_batches" not in settings.typed:
        settings.config.train.eval_batches = -1
    splits = {split for source in find_sources(data) for split in source.find_files()}
    if split not in splits | ({"valid"} if data.valid_fraction is not None else set()):
        raise DataError(f"{data.path} has no {split} split. Another split: --split valid. Other data: data.path=…")


def count_metric_rows(rows: int | None, config: Config) -> int:
    """Return how many rows to answer and score: -1 all, 0 none; `rows` is what --rows says.

    Raises:
        ConfigError: `rows` is invalid, or there is no metric.
    """
    if rows is None:
        return config.data.metric_rows if config.data.metric else 0
    if rows < -1:
        raise ConfigError(f"--rows {rows} is invalid: must be -1 (all), 0 (none) or more.")
    if rows and config.data.metric is None:
        raise ConfigError("--rows needs a metric, and the run's data set has none: data.metric=exact_match or another.")
    return rows
