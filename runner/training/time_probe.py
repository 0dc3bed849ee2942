"""How fast a run trains on this machine, measured by a few of its own updates; nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import mlx.core as mx

from runner.backends.hidden_caches import hidden_caches
from runner.backends.select import select_backend
from runner.config.schema import Config
from runner.data.order import DataPosition
from runner.data.tokenize import TokenizedDataset
from runner.models.load import load_base_model
from runner.models.lora import AdaptedModel
from runner.training.components import longest_row
from runner.training.dataloader import batch_builder, evaluation_loader, split_rows
from runner.training.lr_schedule import learning_rate_of
from runner.training.memory_estimate import batch_order
from runner.training.train_state import TrainState
from runner.training.train_step import TrainStep

_UPDATES = 5
_SECONDS = 20.0


@dataclass(frozen=True)
class Speed:
    """Seconds for each token without padding."""

    update: float
    """Forward, backward and optimizer."""
    frozen: float
    """The frozen blocks, computed once for each row; 0 where none are cached."""
    evaluation: float
    updates: int
    """Updates that were measured."""


def measure_speed(config: Config, data: TokenizedDataset) -> Speed:
    """Load the model, make a few updates from the beginning of the run, and return the speed after the first one.

    At most five updates, and none after twenty seconds. The hidden states are cached in memory alone.

    Raises:
        RunnerError: what the run would raise.
    """
    base = load_base_model(config.model)
    adapted = AdaptedModel(base, config.lora, config.seed)
    backend = select_backend(adapted, config, longest_row(data))
    in_memory = replace(config.train.hidden_cache, memory_gb=1.0, disk_gb=0)
    probed = replace(config, train=replace(config.train, hidden_cache=in_memory))
    caches = hidden_caches(backend, base, probed, lambda line: None)
    state = TrainState.begin(config, adapted.params())
    step, builder = TrainStep(backend, grad_clip=config.train.grad_clip), batch_builder(data.train, config, caches)
    order, position = batch_order(config, data), DataPosition()
    seconds, frozen, tokens, count = 0.0, 0.0, 0, -1
    start = time.perf_counter()
    # The first update allocates its buffers, and compiles where the step is compiled.
    while count < _UPDATES and (count < 1 or time.perf_counter() - start < _SECONDS):
        indices, position = order.next_batches(position, config.train.grad_accumulation)
        begin = time.perf_counter()
        batches = [builder(part) for rows in indices for part in split_rows(rows, config.train.rows_at_once)]
        middle = time.perf_counter()
        step.update(state, batches, learning_rate_of(config, 1))
        if count >= 0:
            frozen += middle - begin
            seconds += time.perf_counter() - middle
            tokens += sum(batch.real_tokens for batch in batches)
        count += 1
    evaluation = 0.0
    if len(data.valid):
        batch = next(iter(evaluation_loader(data.valid, config, caches)))
        begin = time.perf_counter()
        backend.row_losses(state.params, batch)
        evaluation = (time.perf_counter() - begin) / batch.real_tokens
    mx.clear_cache()
    return Speed(seconds / tokens, frozen / tokens if caches else 0.0, evaluation, count)
