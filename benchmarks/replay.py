"""Counts of what a finished run trained on, taken outside of the timing: ``python -m benchmarks.replay JOBS.json``.

Stock mlx-lm is replayed with its own `iterate_batches`, the same data and the same seed: it drops the last partial
batch, and evaluation draws from the generator that orders training. Ours is a function of the row lengths and the seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sides import STOCK


@dataclass
class TokenCounts:
    """Counts of the inputs of one run's training steps; a position predicts the next token."""

    tokens: int = 0
    """Positions of real tokens, without padding."""
    positions: int = 0
    """Positions computed, padding included."""
    supervised: int = 0
    """Supervised tokens."""
    padded_rows: int = 0
    """Rows that are padded: stock mlx-lm trains on one token of that padding."""
    first: int = 0
    """Those of `tokens` in rows that were not trained on before."""
    valid_tokens: int = 0
    """Real positions of one evaluation."""
    valid_supervised: int = 0
    evaluations: int = 0
    seen: set[bytes] = field(default_factory=set, repr=False)

    def add(self, inputs: np.ndarray, lengths: np.ndarray, supervised: int) -> None:
        """Count a batch: `inputs` (batch, positions), `lengths` (batch,) in tokens."""
        self.tokens += int((lengths - 1).sum())
        self.positions += inputs.size
        self.supervised += supervised
        self.padded_rows += int((lengths <= inputs.shape[1]).sum())
        for row, length in zip(inputs, lengths, strict=True):
            text = row[: length - 1].tobytes()
            if text not in self.seen:
                self.seen.add(text)
                self.first += int(length) - 1

    def summary(self) -> dict[str, int]:
        """Return the counts without the set of rows."""
        return {name: value for name, value in asdict(self).items() if name != "seen"}


def evaluates(it: int, iters: int, every: int) -> bool:
    """Return whether stock mlx-lm evaluates before update `it`: the first, every `every`-th and the last."""
    return it == 1 or it % every == 0 or it == iters


Batches = Callable[..., Iterator[tuple[Any, Any]]]


def stock(config: dict[str, Any], train: Any, valid: Any, batches: Batches) -> TokenCounts:
    """Replay ``mlx_lm.lora`` with `config`; `batches` is its `iterate_batches`."""
    size, longest, iters = config["batch_size"], config["max_seq_length"], config["iters"]
    np.random.seed(config["seed"])
    counted = TokenCounts()
    ordered = batches(train, size, longest, loop=True)
    for it in range(1, iters + 1):
        batch = next(ordered)
        if evaluates(it, iters, config["steps_per_eval"]):
            evaluated = TokenCounts()
            for held_out in batches(valid, size, longest):
                evaluated.add(*_inputs_and_lengths(*held_out))
            counted.valid_tokens, counted.valid_supervised = evaluated.tokens, evaluated.supervised
            counted.evaluations += 1
        counted.add(*_inputs_and_lengths(*batch))
    return counted


def _inputs_and_lengths(padded: Any, spans: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Return inputs, lengths and supervised tokens, without the padding token, of a batch of stock mlx-lm."""
    begins, lengths = np.array(spans).T
    return np.array(padded)[:, :-1], lengths, int((lengths - np.maximum(begins, 1)).sum())


def ours(job: dict[str, Any], data: Any) -> TokenCounts:
    """Count the batches that `runner` forms of `data` with the settings in `job`; ``packed``: without padding."""
    from runner.data.batch import collate
    from runner.data.length_buckets import LengthBuckets
    from runner.data.order import BatchOrder, DataPosition, evaluation_batches

    counted = TokenCounts()
    order = BatchOrder(data.train.lengths, job["batch_size"], job["seed"], job["window"])
    buckets = LengthBuckets.from_lengths(data.train.lengths, job["pad_to"])
    for rows in order.next_batches(DataPosition(), job["iters"])[0]:
        batch = collate(data.train, rows, buckets)
        counted.add(batch.inputs, data.train.lengths[rows], batch.supervised)
    if job["packed"]:
        counted.positions = counted.tokens
    evaluated = TokenCounts()
    for rows in evaluation_batches(data.valid.lengths, job["batch_size"]):
        batch = collate(data.valid, rows, buckets)
        evaluated.add(batch.inputs, data.valid.lengths[rows], batch.supervised)
    counted.valid_tokens, counted.valid_supervised = evaluated.tokens, evaluated.supervised
    counted.evaluations = 1 + sum(u % job["eval_every"] == 0 or u == job["iters"] for u in range(1, job["iters"] + 1))
    return counted


def main(jobs: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Count each job: stock ones have ``config`` and ``sorted``, ours the settings that `ours` reads."""
    from runner.backends import blas

    blas.load_blas()
    from mlx_lm.tuner.datasets import CacheDataset, CompletionsDataset
    from mlx_lm.tuner.trainer import iterate_batches
    from mlx_lm.utils import load_tokenizer

    from benchmarks.stock import repair_sort
    from benchmarks.workloads import encode_options
    from runner.data.tokenize import load_dataset

    own_length = CacheDataset.itemlen
    tokenizer = cache(lambda model: load_tokenizer(Path(model)))

    @cache
    def rows(model: str, data: str, split: str) -> Any:
        text = (Path(data) / f"{split}.jsonl").read_text(encoding="utf-8")
        raw = [json.loads(line) for line in text.splitlines()]
        return CacheDataset(CompletionsDataset(raw, tokenizer(model), "prompt", "completion", True))

    splits = cache(lambda model, data: load_dataset(data, tokenizer(model), encode_options(), ("train", "valid")))
    counted = []
    for job in jobs:
        CacheDataset.itemlen = own_length
        if job["side"] == STOCK:
            if job["sorted"]:
                repair_sort()
            config = job["config"]
            train, valid = (rows(config["model"], config["data"], split) for split in ("train", "valid"))
            counted.append(stock(config, train, valid, iterate_batches))
        else:
            counted.append(ours(job, splits(job["model"], job["data"])))
    return [each.summary() for each in counted]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
