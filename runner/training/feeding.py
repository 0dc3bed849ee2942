"""From settings to what feeds the model: the forward pass in its parts, the trunk's cache, evaluation's batches."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np

from runner.backends.cpu import cross_entropy, native, threads
from runner.backends.cpu.blas import BlasReport, blas_identity
from runner.backends.cpu.build import fits, make_engine
from runner.backends.cpu.ops import Ops
from runner.common.cache_dir import cache_dir
from runner.common.fact_cache import Fact
from runner.config.schema import Config
from runner.data.length_buckets import LengthBuckets
from runner.data.order import evaluation_batches
from runner.data.tokenize import TokenSet
from runner.models import forward as forward_module
from runner.models import lora
from runner.models.device import on_cpu
from runner.models.forward import Forward
from runner.models.hidden_cache import HiddenStateCaches, numeric_platform
from runner.models.load import BaseModel
from runner.training import loss
from runner.training.dataloader import BatchBuilder, FixedBatches

UNSORTED, NEAR_LENGTHS = 1, 64
"""Windows of `data.window`: null."""
_PROVEN = {"agrees": True}
_DROPOUT = "lora.dropout is above 0"


def make_forward(base: BaseModel, num_layers: int, settings: Config, blas: BlasReport) -> Forward:
    """The forward pass of `base` with an adapter on its last `num_layers` blocks."""
    t = settings.train
    cross_entropy.configure(on=t.cpu_engine)
    threads.configure(blas.threads or 1)
    cut = len(base.model.layers) - num_layers if t.hidden_cache.enabled else 0
    fact = _probes_fact(base, cut, settings, blas) if t.cache_probes else None
    known = fact is not None and fact.load() == _PROVEN
    forward = Forward(base.model, cut, everywhere=t.head == "all", piece=t.loss_chunk, proven=known)
    if t.cpu_engine and on_cpu():
        forward.why_mlx = _why_no_engine(forward, settings)
        if not forward.why_mlx:
            ops, forward.why_numpy = ops_of(settings)
            forward.engine, forward.why_mlx = make_engine(forward, recompute=t.grad_checkpoint, proven=known, ops=ops)
    # Only what was used and found right is kept: a failure may be mended by tomorrow.
    if fact and not known and forward.split and forward.cut == cut and not forward.why_mlx:
        fact.store(_PROVEN)
    return forward


def _probes_fact(base: BaseModel, cut: int, settings: Config, blas: BlasReport) -> Fact:
    """Where it is kept that the parts of the model and the engine agree with the whole: by all that decides it."""
    t = settings.train
    ops = ops_of(settings)[0] if t.cpu_engine and on_cpu() else None
    return Fact.of(
        "checks",
        {
            "base": base.content_hash,
            "cut": cut,
            "lora": asdict(settings.lora),
            "train": (t.cpu_engine, t.head, t.loss_chunk, t.grad_checkpoint, t.compile),
            "ops": ops and (ops.name, ops.build),
            "blas": blas_identity(blas),
            "python": platform.python_version(),
            "code": _code(),
            **numeric_platform(),
        },
    )


def ops_of(settings: Config) -> tuple[Ops, str]:
    """What the engine computes with beside products; and where that is NumPy though C is wanted, why."""
    found, why = native.load() if settings.train.cpu_native else (None, "")
    return found or Ops(), why


@cache
def _code() -> str:
    """SHA-256 of the modules that compute, and of what they are compared with."""
    digest = hashlib.sha256()
    ours = (Path(str(module.__file__)) for module in (forward_module, lora, loss))
    for module in sorted((*Path(threads.__file__).parent.glob("*.[cp]*"), *ours)):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def _why_no_engine(forward: Forward, settings: Config) -> str:
    """Which setting the engine does not know, or nothing."""
    found = {
        _DROPOUT: settings.lora.dropout > 0,
        "train.compile=always": settings.train.compile == "always",
        "train.head=all": settings.train.head == "all",
        "this model's head cannot be computed apart": not forward.split,
    }
    return next((why for why, so in found.items() if so), "")


def window_of(forward: Forward, settings: Config) -> int:
    """`data.window`, and where it is left open the one that trains best for its time.

    Batches of near lengths save padding, but an update by short rows alone moves less. Without padding to save they
    are not worth it. Dropout leaves the answer alone: the jobs of a sweep over it are to meet the same batches.
    """
    if settings.data.window is not None:
        return settings.data.window
    without_padding = forward.engine is not None or (
        settings.train.cpu_engine and on_cpu() and forward.why_mlx == _DROPOUT and fits(forward)
    )
    return UNSORTED if without_padding else NEAR_LENGTHS


def make_hidden_caches(
    forward: Forward, base: BaseModel, settings: Config, blas: BlasReport, say: Callable[[str], None]
) -> HiddenStateCaches | None:
    """The cache of what `forward` computes below its cut, or None where it has none."""
    if not forward.cut:
        return None
    chosen = settings.train.hidden_cache
    identity = {
        "base": base.content_hash,
        "cut": forward.cut,
        "blas": blas_identity(blas),
        "engine": forward.engine and forward.engine.identity,
        **numeric_platform(),
    }
    return HiddenStateCaches(
        forward,
        identity,
        memory_gb=chosen.memory_gb,
        disk_gb=chosen.disk_gb,
        folder=Path(chosen.folder).expanduser() if chosen.folder else cache_dir() / "trunk",
        say=say,
    )


def batch_builder(rows: TokenSet, settings: Config, trunks: HiddenStateCaches | None) -> BatchBuilder:
    """What makes batches of `rows`."""
    return BatchBuilder(rows, settings.data.pad_to, trunks.of(rows) if trunks and len(rows) else None)


def fixed_batches(rows: TokenSet, settings: Config, trunks: HiddenStateCaches | None) -> FixedBatches:
    """The batches of an evaluation: rows chosen in batches of training's size, computed in larger ones."""
    t, feed = settings.train, batch_builder(rows, settings, trunks)
    chosen = evaluation_batches(rows.lengths, t.batch_size, t.eval_batches)
    return FixedBatches(feed, joined(chosen, rows.lengths, feed.widths, t.eval_tokens))


def joined(chosen: list[np.ndarray], lengths: np.ndarray, widths: LengthBuckets, most: int) -> list[np.ndarray]:
    """Neighbours of `chosen` joined while their padded positions stay within `most`; rows are by rising length."""
    groups: list[list[np.ndarray]] = []
    count = 0
    for rows in chosen:
        width = widths.fit(int(lengths[rows].max()) - 1)
        if groups and (count + len(rows)) * width <= most:
            groups[-1].append(rows)
            count += len(rows)
        else:
            groups.append([rows])
            count = len(rows)
    return [np.concatenate(group) for group in groups]
