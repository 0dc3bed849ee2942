"""The peak memory of a run, estimated by its parts before it starts: from shapes alone, nothing is computed.

What is alive at the peak:

- weights: those of the base model, as they are converted for the device. (The frozen blocks are freed only where every
  row's hidden states are on disk already, so a first run has them.)
- adapter and optimizer: weights, moments, gradients; where an update itself takes more than its forward and backward
  pass, as with a large adapter and short rows, old and new ones at once.
- activations and logits: of the micro-batch that takes most, or of the largest batch of an evaluation, or of the frozen
  blocks; see `Backend.update_memory`. The order of the batches is known, so the largest one is, too.
- caches: hidden states in memory, those of prefetched batches, and MLX's freed buffers.
- process: Python, its libraries, the tokenizer.
- loading: what reading the weights takes beyond all of this, which decides where training takes little.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from runner.backends.protocol import Backend, BackendBatch, StepMemory
from runner.backends.select import unverified_backend
from runner.common.memory import available_memory, resident_memory
from runner.config.schema import Config, MethodConfig
from runner.data.batch import collate
from runner.data.length_buckets import LengthBuckets
from runner.data.order import BatchOrder, DataPosition, evaluation_batches
from runner.data.token_set import TokenSet
from runner.data.tokenize import TokenizedDataset
from runner.models.device import on_cpu
from runner.models.lora import AdaptedModel
from runner.models.shapes import load_shapes
from runner.training.dataloader import joined_evaluation_batches, split_rows
from runner.training.epochs import updates_of
from runner.training.memory import default_cache_limit
from runner.training.optimizer import state_bytes

PROCESS_BYTES = 120_000_000
"""Measured: a run of the tiny model, whose arrays take next to nothing (Linux, Python 3.11)."""
_MAX_ROWS, _MAX_EPOCHS = 2_000_000, 20
"""Rows and epochs in whose order the largest batch is looked for."""
_CPU_BUFFER_CACHE = 32 << 20
"""MLX's own limit of its cache of freed buffers on the CPU."""


@dataclass(frozen=True)
class PlannedModel:
    """A model with its adapter and its backend; its weights may be shapes alone."""

    adapted: AdaptedModel
    backend: Backend
    has_weights: bool = True
    """Whether the weights are on this machine."""


def plan_model(config: Config) -> PlannedModel:
    """Return the model of `config` on shapes alone.

    Raises:
        ModelError: there is no config of this model here, or it is not supported.
    """
    base, has_weights = load_shapes(config.model)
    adapted = AdaptedModel(base, config.lora, config.seed)
    return PlannedModel(adapted, unverified_backend(adapted, config), has_weights)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a run, by part."""

    weights: int
    adapter_and_optimizer: int
    activations: int
    logits: int
    caches: int
    process: int
    loading: int
    buffer_cache: int
    """MLX's freed buffers, of `caches`."""
    outside_mlx: int
    """Of activations and logits, what the CPU engine allocates."""

    @property
    def total(self) -> int:
        """Resident memory of the process."""
        return self.mlx + self.outside_mlx + self.caches + self.process + self.loading

    @property
    def mlx(self) -> int:
        """MLX's own count of its arrays, `peak_memory_gb` in metrics.jsonl."""
        return self.weights + self.adapter_and_optimizer + self.activations + self.logits - self.outside_mlx

    @property
    def on_device(self) -> int:
        """What a GPU holds."""
        return self.mlx + self.buffer_cache

    def parts(self) -> dict[str, int]:
        """Return the bytes by part; their sum is `total`."""
        names = ("weights", "adapter_and_optimizer", "activations", "logits", "caches", "process", "loading")
        return {name: value for name, value in asdict(self).items() if name in names}


def estimate_memory(config: Config, data: TokenizedDataset, planned: PlannedModel) -> MemoryEstimate:
    """Return the estimate for a run of `config` on `data`.

    Raises:
        ModelError: the model cannot be trained.
    """
    adapted, backend = planned.adapted, planned.backend
    params = adapted.params()
    adapter = sum(array.nbytes for array in params.values())
    # Of modules that are trained whole, to give the base back; and what PiSSA subtracts.
    kept = adapted.original_bytes + adapted.start_bytes
    everything = sum(array.nbytes for _, array in tree_flatten(adapted.model.parameters()))
    moments = state_bytes(config.optimizer, params)
    # The mean is of float32, as the weights are; its next value is computed beside it, in place of the gradients.
    moments += adapter if config.train.averaging_power is not None else 0
    # The sum of the gradients stays while the next micro-batch, or its next part, is computed.
    sums = config.train.grad_accumulation > 1 or (config.train.rows_at_once or math.inf) < config.train.batch_size
    while_computing = adapter * (1 + sums) + moments
    # Old and new weights, the sum and the mean of the gradients, and temporary arrays of that size (measured); an array
    # of the moments is freed once its new one is computed.
    while_updating = adapter * 5 + moments
    step = max(_steps(config, data, planned), key=lambda step: step.total, default=StepMemory(0, 0))
    in_mlx = 0 if backend.uses_host_memory else step.total
    hidden = _hidden_bytes(config, data, backend)
    limit = config.train.cache_limit_gb
    cache_limit = int(limit * 1e9) if limit is not None else default_cache_limit() or _CPU_BUFFER_CACHE
    buffer_cache = min(cache_limit, in_mlx + while_updating)
    training = hidden + buffer_cache + step.total + max(while_computing, while_updating - in_mlx)
    return MemoryEstimate(
        weights=everything - adapter + kept,
        adapter_and_optimizer=max(while_computing, while_updating - in_mlx),
        activations=step.activations,
        logits=step.logits,
        caches=hidden + buffer_cache,
        process=PROCESS_BYTES,
        loading=max(0, _loading_bytes(planned) - training),
        buffer_cache=buffer_cache,
        outside_mlx=step.total - in_mlx,
    )


def _loading_bytes(planned: PlannedModel) -> int:
    """Return what loading takes beyond the weights: the largest array as it is stored, while it is converted; of a GGUF
    file its values in float32, twice."""
    largest = max(array.size for _, array in tree_flatten(planned.adapted.model.parameters()))
    return largest * 4 * (2 if planned.adapted.base.folder is None else 1)


def batch_order(config: Config, data: TokenizedDataset) -> BatchOrder:
    """Return the order of the batches of a new run."""
    window = config.data.window or 1
    return BatchOrder(data.train.example_lengths, config.train.batch_size, config.seed, window, data.mixture)


def iterations(config: Config, data: TokenizedDataset) -> int:
    """Return the number of updates of the run."""
    t = config.train
    if t.epochs is None:
        return t.iters
    return updates_of(t.epochs, data.train.example_count, t.batch_size, t.grad_accumulation)


def device_limit() -> tuple[int, str]:
    """Return the bytes that a run may take, and what sets this limit.

    On a GPU it is the memory of the device, on Metal the part of it that the system recommends to work in; on the CPU
    the memory that is available to this process now, with what it has already.
    """
    if on_cpu():
        return available_memory() + resident_memory(), "available memory"
    info = mx.device_info()
    for name, text in (
        ("max_recommended_working_set_size", "the GPU's recommended working set"),
        ("total_memory", "the GPU's memory"),
        ("memory_size", "the GPU's memory"),
    ):
        if isinstance(info.get(name), (int, float)):
            return int(info[name]), text
    return available_memory(), "available memory"


def needed(estimate: MemoryEstimate) -> int:
    """Return the bytes to compare with `device_limit`."""
    return estimate.total if on_cpu() else estimate.on_device


def _steps(config: Config, data: TokenizedDataset, planned: PlannedModel) -> Iterator[StepMemory]:
    """Yield the memory of the largest batches."""
    backend, params = planned.backend, planned.adapted.params()
    order = batch_order(config, data)
    samples = config.method.name == "grpo"
    for token_set, batches, compute in (
        (data.train, _largest_batches(config, order, iterations(config, data)), backend.update_memory),
        (data.valid, [] if samples else _largest_evaluation(config, data.valid), backend.evaluation_memory),
    ):
        for indices in batches:
            rows, own = token_set.rows_of(indices), token_set
            if samples:
                own, rows = _sampled(token_set, rows, config.method)
            batch = collate(own, rows, LengthBuckets.from_lengths(own.lengths, config.data.pad_to))
            hidden = None
            if backend.split_model.frozen_blocks and not samples:
                # Not written to, so that the system gives it no memory.
                shape = (*batch.inputs.shape, backend.split_model.hidden_size)
                hidden = np.zeros(shape, _hidden_dtype(backend))
            yield compute(params, BackendBatch(batch, hidden))
    if backend.split_model.frozen_blocks and not samples:
        examples = 1 if on_cpu() else min(config.train.batch_size, config.train.rows_at_once or config.train.batch_size)
        count = examples * data.train.rows_per_example
        yield backend.frozen_memory(np.zeros((count, int(data.train.lengths.max())), np.int32))


def _sampled(prompts: TokenSet, rows: np.ndarray, method: MethodConfig) -> tuple[TokenSet, np.ndarray]:
    """Return the longest answers that can be sampled to the prompts `rows`, and their indices."""
    longest = int(method.max_new_tokens or 0)
    starts = [int(prompts.row(int(row))[1].argmax()) for row in rows]
    lengths = np.repeat([start + longest for start in starts], int(method.group_size or 1))
    supervised = np.concatenate([np.arange(length) >= length - longest for length in lengths])
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    indices = np.arange(len(lengths), dtype=np.int64)
    return TokenSet(np.zeros(int(lengths.sum()), np.int32), supervised, offsets, indices), indices


def _largest_batches(config: Config, order: BatchOrder, iters: int) -> list[np.ndarray]:
    """Return the rows of the micro-batches that may take most: by positions with and without padding, by the squares of
    lengths, and by supervised tokens."""
    count = iters * config.train.grad_accumulation
    epochs = min(-(-count // order.batches_per_epoch), max(1, _MAX_ROWS // len(order.lengths)), _MAX_EPOCHS)
    buckets = LengthBuckets.from_lengths(order.lengths, config.data.pad_to)
    padded = {int(n): buckets.padded_length(int(n) - 1) for n in np.unique(order.lengths)}
    found: dict[str, tuple[tuple[int, int], np.ndarray]] = {}
    for epoch in range(epochs):
        batches = order.next_batches(DataPosition(epoch), min(order.batches_per_epoch, count))[0]
        count -= len(batches)
        batches = [part for rows in batches for part in split_rows(rows, config.train.rows_at_once)]
        sizes = np.array([len(batch) for batch in batches])
        starts = np.cumsum(sizes) - sizes
        lengths = order.lengths[np.concatenate(batches)]
        longest = np.array([padded[int(n)] for n in np.maximum.reduceat(lengths, starts)])
        real = np.add.reduceat(lengths, starts)
        for name, score in (
            ("positions", sizes * longest),
            ("squares", sizes * longest * longest),
            ("real", real),
        ):
            # Of equal ones that with most real tokens.
            best = int(np.lexsort((real, score))[-1])
            entry = (int(score[best]), int(real[best]))
            if name not in found or entry > found[name][0]:
                found[name] = entry, batches[best]
    return list({tuple(rows): rows for _, rows in found.values()}.values())


def _largest_evaluation(config: Config, token_set: TokenSet) -> list[np.ndarray]:
    if not len(token_set):
        return []
    lengths, buckets = token_set.example_lengths, LengthBuckets.from_lengths(token_set.lengths, config.data.pad_to)
    batches = joined_evaluation_batches(token_set, config, buckets)
    largest = max(batches, key=lambda rows: len(rows) * int(lengths[rows].max()))
    return [largest] if largest is batches[-1] else [largest, batches[-1]]  # the last has the longest rows


def _hidden_dtype(backend: Backend) -> np.dtype:
    return np.dtype(np.float32 if backend.split_model.hidden_dtype.size == 4 else np.uint16)


def hidden_state_bytes(backend: Backend, token_set: TokenSet) -> int:
    """Return the bytes of the hidden states of all rows; 0 where none are cached."""
    split_model = backend.split_model
    if not split_model.frozen_blocks:
        return 0
    return (len(token_set.tokens) - len(token_set)) * split_model.hidden_size * int(split_model.hidden_dtype.size)


def _hidden_bytes(config: Config, data: TokenizedDataset, backend: Backend) -> int:
    """Return the memory of cached hidden states, and of those in the current and the prefetched micro-batches."""
    split_model, t = backend.split_model, config.train
    if not split_model.frozen_blocks:
        return 0
    # Of each row that the run reads, in an evaluation or before it ends.
    rows_read = iterations(config, data) * t.grad_accumulation * t.batch_size
    cached = hidden_state_bytes(backend, data.train) * min(1.0, rows_read / data.train.example_count)
    if len(data.valid):
        evaluated = sum(map(len, evaluation_batches(data.valid.example_lengths, t.batch_size, t.eval_batches)))
        cached += hidden_state_bytes(backend, data.valid) * evaluated / data.valid.example_count
    a_position = split_model.hidden_size * int(split_model.hidden_dtype.size)
    a_batch = t.batch_size * data.train.rows_per_example * int(data.train.lengths.max()) * a_position
    return min(int(t.hidden_cache.memory_gb * 1e9), int(cached)) + (1 + t.prefetch) * t.grad_accumulation * a_batch
