"""Settings with which a run fits into memory, and what each of them brings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from mlx.utils import tree_flatten

from runner.common.errors import RunnerError
from runner.config.schema import Config
from runner.data.token_set import TokenSet
from runner.data.tokenize import TokenizedDataset
from runner.models.device import on_cpu
from runner.training.memory_estimate import (
    PROCESS_BYTES,
    PlannedModel,
    device_limit,
    estimate_memory,
    needed,
    plan_model,
)

_SHARE_THAT_SURELY_FITS = 0.5


@dataclass(frozen=True)
class Option:
    """Overrides, and the bytes that the run needs with them."""

    overrides: dict[str, Any]
    needed: int

    def text(self) -> str:
        """Return the overrides as they are typed."""
        return " ".join(
            f"{name}={str(value).lower() if isinstance(value, bool) else value}"
            for name, value in self.overrides.items()
        )


def memory_warning(config: Config, data: TokenizedDataset, planned: PlannedModel) -> str | None:
    """Return the warning of a run that probably does not fit, with the setting that helps most; None where it fits."""
    try:
        limit, what = device_limit()
        if surely_fits(config, data, planned, limit):
            return None
        need = needed(estimate_memory(config, data, planned))
    except RunnerError:  # no reason not to train
        return None
    if need <= limit:
        return None
    text = f"memory {need / 1e9:.1f} GB are needed at the peak, by estimate, and {limit / 1e9:.1f} GB is {what}"
    options = options_that_help(config, data)
    if options and options[0].needed < need:
        text += f"; {options[0].text()} brings it to {options[0].needed / 1e9:.1f} GB"
    return f"{text} (runner plan shows the parts, runner plan --fit what fits)"


def options_that_help(config: Config, data: TokenizedDataset) -> list[Option]:
    """Return single changes, the one that saves most first."""
    found = []
    for overrides in _changes(config, data):
        try:
            changed = with_overrides(config, overrides)
            found.append(
                Option(overrides, needed(estimate_memory(changed, _cut(data, overrides), plan_model(changed))))
            )
        except RunnerError:  # not possible with this model
            continue
    return sorted(found, key=lambda option: option.needed)


def fit(config: Config, data: TokenizedDataset) -> Option | None:
    """Return the overrides with which the run fits and is fastest, none where it is so already; None if nothing fits.

    Without gradient checkpointing if possible, which takes 1.4 times the time, then as many rows at once as fit. The
    batches and updates stay the same, and with them the result.
    """
    limit, _ = device_limit()
    t = config.train
    for checkpointing in (False, True):
        for rows in _fractions(t.batch_size):
            overrides: dict[str, Any] = {
                "train.grad_checkpoint": checkpointing,
                "train.rows_at_once": None if rows == t.batch_size else rows,
            }
            changed = with_overrides(config, overrides)
            try:
                need = needed(estimate_memory(changed, data, plan_model(changed)))
            except RunnerError:  # this model's blocks cannot be recomputed
                break
            if need <= limit:
                same = {"train.grad_checkpoint": t.grad_checkpoint, "train.rows_at_once": t.rows_at_once}
                return Option({name: value for name, value in overrides.items() if value != same[name]}, need)
    return None


def _fractions(batch_size: int) -> list[int]:
    """Return the sizes of the parts of a micro-batch, the largest first: those that make one part more each time."""
    return list(dict.fromkeys(-(-batch_size // parts) for parts in range(1, batch_size + 1)))


def with_overrides(config: Config, overrides: dict[str, Any]) -> Config:
    """Return `config` with the settings of these dotted names changed."""
    changed = copy.deepcopy(config)
    for name, value in overrides.items():
        *path, last = name.split(".")
        section: Any = changed
        for part in path:
            section = getattr(section, part)
        setattr(section, last, value)
    return changed


def _changes(config: Config, data: TokenizedDataset) -> Iterator[dict[str, Any]]:
    t, longest = config.train, int(data.train.lengths.max())
    if not t.grad_checkpoint:
        yield {"train.grad_checkpoint": True}
    if (rows := t.rows_at_once or t.batch_size) > 1:
        yield {"train.rows_at_once": -(-rows // 2)}
    if t.head == "all":
        yield {"train.head": "supervised"}
    if not t.hidden_cache.enabled:
        yield {"train.hidden_cache.enabled": True}
    if not on_cpu() and config.model.quantize.bits is None:
        yield {"model.quantize.bits": 4}
    if longest > 256:
        yield {"data.max_length": longest // 2}
    if config.lora.num_layers != 1:
        blocks = config.lora.num_layers
        yield {"lora.num_layers": max(1, blocks // 2) if blocks > 0 else 8}


def _cut(data: TokenizedDataset, overrides: dict[str, Any]) -> TokenizedDataset:
    """Return the data as data.max_length of `overrides` would cut it."""
    length = overrides.get("data.max_length")
    if length is None:
        return data
    changed = copy.copy(data)
    for split in ("train", "valid"):
        object.__setattr__(changed, split, _cut_rows(getattr(data, split), length))
    return changed


def _cut_rows(token_set: TokenSet, length: int) -> TokenSet:
    kept = np.minimum(token_set.lengths, length)
    positions = np.arange(len(token_set.tokens)) - np.repeat(token_set.offsets[:-1], token_set.lengths)
    inside = positions < length
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    tokens, supervised = token_set.tokens[inside], token_set.supervised[inside]
    return replace(token_set, tokens=tokens, supervised=supervised, offsets=offsets)


def surely_fits(config: Config, data: TokenizedDataset, planned: PlannedModel, limit: int) -> bool:
    """Return whether a rough bound, which takes no time, is far below the limit.

    Of each trained block and each position of a micro-batch, twice the inputs and outputs of every matrix; of an
    evaluation, those of two blocks; the scores of attention, where no fused kernel computes them, for heads of 32; and
    eight times the logits.
    """
    model, t = planned.adapted.model, config.train
    arrays = [array for _, array in tree_flatten(model.parameters())]
    a_block = [array for _, array in tree_flatten(model.layers[-1].parameters()) if array.ndim > 1]
    largest, longest = max(arrays, key=lambda array: array.size), int(data.train.lengths.max())
    widths = sum(sum(array.shape[-2:]) for array in a_block)
    scores = 16 * longest * max(1, largest.shape[-1] // 32) if on_cpu() else 0
    a_position = 8 * widths + scores
    training = t.batch_size * data.train.rows_per_example * longest
    evaluation = max(training, t.eval_tokens)
    logits = 32 * max(largest.shape) * (evaluation if t.head == "all" else t.loss_chunk)
    bound = (
        PROCESS_BYTES
        + t.hidden_cache.memory_gb * 1e9
        + 1.5 * sum(array.nbytes for array in arrays)
        + a_position * max((planned.adapted.depth - planned.adapted.frozen_blocks) * training, 2 * evaluation)
        + logits
    )
    return bound < _SHARE_THAT_SURELY_FITS * limit
