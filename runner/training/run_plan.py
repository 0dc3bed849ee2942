"""What a run will need and do, before it starts: memory, updates, tokens, time and disk, as one plain document."""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.cache_dir import cache_dir
from runner.config.schema import Config
from runner.data.formats import EncodeOptions
from runner.data.order import evaluation_batches
from runner.data.token_set import TokenSet
from runner.data.tokenize import TokenizedDataset, load_data
from runner.models.lora import trainable_share
from runner.models.tokenizer_only import load_tokenizer_only
from runner.training.memory_estimate import (
    MemoryEstimate,
    PlannedModel,
    batch_order,
    device_limit,
    hidden_state_bytes,
    iterations,
    needed,
)
from runner.training.optimizer import state_bytes
from runner.training.plan import evaluation_count
from runner.training.time_probe import Speed

_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "*.tiktoken")
_STATE_BYTES = 30_000
"""Of a checkpoint's files beside the adapter and the optimizer's state."""


def load_planned_data(config: Config, planned: PlannedModel) -> tuple[TokenizedDataset, str | None]:
    """Return the data of the run, tokenized as for training, or rows of data.max_length where the tokenizer is missing.

    Returns:
        the data, and what was assumed; None where it is the run's own.

    Raises:
        RunnerError: the data or the tokenizer cannot be used.
    """
    options = EncodeOptions.from_config(config.data, config.method.name)
    folder = planned.adapted.base.folder
    if not planned.has_weights and folder and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        assumption = f"the tokenizer is not here: every row is taken for {config.data.max_length} tokens"
        return _assumed_data(config, options), assumption
    return load_data(config, load_tokenizer_only(config.model)), None


def _assumed_data(config: Config, options: EncodeOptions) -> TokenizedDataset:
    rows, length = config.train.batch_size * config.train.grad_accumulation, config.data.max_length
    return TokenizedDataset(
        train=_full_rows(rows, length),
        valid=_full_rows(0, length),
        test=_full_rows(0, length),
        parts={},
        stats={},
        tokenizer=None,
        options=options,
    )


def _full_rows(rows: int, length: int) -> TokenSet:
    supervised = np.ones(rows * length, np.bool_)
    supervised[::length] = False
    offsets = np.arange(rows + 1, dtype=np.int64) * length
    return TokenSet(np.zeros(rows * length, np.int32), supervised, offsets, np.arange(rows))


def describe_run(
    config: Config,
    data: TokenizedDataset,
    planned: PlannedModel,
    estimate: MemoryEstimate,
    speed: Speed | None,
    assumed: str | None,
) -> dict[str, Any]:
    """Return the plan; bytes and seconds. `speed`: None where it was not measured; `assumed`: what was, of the data."""
    limit, what = device_limit()
    trained, parameters = trainable_share(planned.adapted)
    return {
        "model": {
            "path": config.model.path,
            "parameters": parameters,
            "trained_parameters": trained,
            "trained_blocks": len(planned.adapted.targets.blocks),
            "trained_in": planned.adapted.targets.where,
            "blocks": len(planned.adapted.model.layers),
            "weights_are_here": planned.has_weights,
        },
        "memory": {
            **estimate.parts(),
            "total": estimate.total,
            "mlx": estimate.mlx,
            "needed": needed(estimate),
            "limit": limit,
            "limit_is": what,
            "fits": needed(estimate) <= limit,
        },
        "updates": None if assumed else _updates(config, data),
        "assumed": assumed,
        "time": None if assumed or speed is None else _times(config, data, speed),
        "time_excludes": _TIME_EXCLUDES.get(config.method.name),
        "disk": _disk(config, data, planned, assumed),
    }


_TIME_EXCLUDES = {
    **dict.fromkeys(("dpo", "ipo", "orpo", "simpo", "kto"), "the pass that computes log-probabilities, about a third"),
    "grpo": "the sampling of answers and their scores, often most of the time",
}


def _updates(config: Config, data: TokenizedDataset) -> dict[str, Any]:
    order, t = batch_order(config, data), config.train
    updates = order.batches_per_epoch / t.grad_accumulation
    tokens = _tokens_an_epoch(data)
    return {
        "rows": t.batch_size * t.grad_accumulation,
        "tokens": round(tokens / updates),
        "an_epoch": math.ceil(updates),
        "of_the_run": iterations(config, data),
        "rows_an_epoch": data.train.example_count,
        "tokens_an_epoch": round(tokens),
        "longest_row": int(data.train.lengths.max()),
    }


def _tokens_an_epoch(data: TokenizedDataset) -> float:
    """Return the tokens that the model reads in an epoch: of each row, all but the last."""
    counts = (data.train.lengths - 1).reshape(-1, data.train.rows_per_example).sum(axis=1)
    if data.mixture is None:
        return float(counts.sum())
    starts = np.cumsum([0, *data.mixture.sizes])
    means = [counts[a:b].mean() if b > a else 0.0 for a, b in pairwise(starts)]
    return float(sum(n * mean for n, mean in zip(data.mixture.counts, means, strict=True)))


def _times(config: Config, data: TokenizedDataset, speed: Speed) -> dict[str, Any]:
    t, updates = config.train, _updates(config, data)
    iters, tokens = updates["of_the_run"], updates["tokens_an_epoch"]
    an_evaluation, evaluations = 0.0, 0
    if len(data.valid):
        examples = np.concatenate(evaluation_batches(data.valid.example_lengths, t.batch_size, t.eval_batches))
        rows = data.valid.rows_of(examples)
        an_evaluation = float((data.valid.lengths[rows] - 1).sum()) * speed.evaluation
        evaluations = 1 + evaluation_count(t, iters)
    epochs = iters / (batch_order(config, data).batches_per_epoch / t.grad_accumulation)
    training = epochs * tokens * speed.update + min(1.0, epochs) * tokens * speed.frozen
    return {
        "tokens_per_second": round(1 / speed.update, 1),
        "an_update": updates["tokens"] * speed.update,
        "an_epoch": tokens * speed.update,
        "first_epoch": tokens * (speed.update + speed.frozen),
        "an_evaluation": an_evaluation,
        "of_the_run": training + evaluations * an_evaluation,
        "measured_updates": speed.updates,
    }


def _disk(config: Config, data: TokenizedDataset, planned: PlannedModel, assumed: str | None) -> dict[str, Any]:
    """Return what the run writes at most: the checkpoints that are retained, one being written, the result, a backup of
    each checkpoint worth it, and the caches of hidden states and tokens."""
    adapted = planned.adapted
    params = adapted.params()
    adapter = sum(array.nbytes for array in params.values())
    adapter += adapted.start_bytes
    averaged = adapter if config.train.averaging_power is not None else 0
    checkpoint = adapter + averaged + state_bytes(config.optimizer, params) + _STATE_BYTES
    c, iters = config.checkpoint, iterations(config, data)
    kept_by_step = iters // c.keep_every if c.keep_every else 0
    evaluations = evaluation_count(config.train, iters) if len(data.valid) else 0
    saves = 1 + (iters // c.every if c.every else 0) + evaluations
    retained = min(saves, c.keep_last + c.keep_best + kept_by_step + 1)
    hidden = 0
    if not assumed:
        splits = [data.train, data.valid, *([data.test] if config.train.test else [])]
        size = sum(hidden_state_bytes(planned.backend, split) for split in splits)
        hidden = min(size, int(config.train.hidden_cache.disk_gb * 1e9))
    tokens = sum(len(split.tokens) * 5 for split in (data.train, data.valid, data.test)) if config.data.cache else 0
    run = (retained + 1) * checkpoint + adapter
    return {
        "a_checkpoint": checkpoint,
        "checkpoints": retained,
        "run": run,
        "backup": (c.keep_best + kept_by_step + 1) * checkpoint + adapter if c.backup else 0,
        "hidden_states": hidden,
        "tokens": 0 if assumed else tokens,
        "free": shutil.disk_usage(_existing(Path.cwd())).free,
        "free_for_caches": shutil.disk_usage(_existing(Path(config.train.hidden_cache.folder or cache_dir()))).free,
    }


def _existing(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
