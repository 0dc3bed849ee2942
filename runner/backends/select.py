"""Choose the backend of a run, once, from its settings, its model and the device."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict
from functools import cache
from pathlib import Path

from runner.backends import blas
from runner.backends.cpu import native, probe
from runner.backends.cpu.backend import CpuBackend
from runner.backends.cpu.engine import Engine
from runner.backends.cpu.linear import UnsupportedModel
from runner.backends.cpu.ops import Ops
from runner.backends.mlx.backend import MlxBackend
from runner.backends.protocol import Backend
from runner.common.result_cache import CachedResult
from runner.config.schema import Config, TrainConfig
from runner.models import dropout, lora, split_model
from runner.models.device import on_cpu
from runner.models.hidden_cache import numeric_platform
from runner.models.lora import AdaptedModel
from runner.models.split_model import SplitModel

_VERIFIED = {"agrees": True}
_UNSUPPORTED = (UnsupportedModel, AttributeError)  # another version of mlx-lm may rename parts of its models


def select_backend(adapted: AdaptedModel, config: Config) -> Backend:
    """Return the CPU engine where it can compute this run, else MLX.

    That the parts of the model and the engine compute what the whole model does is probed, and the result cached for
    the same model, settings, machine and code.
    """
    t = config.train
    cut = len(adapted.model.layers) - adapted.num_layers if t.hidden_cache.enabled else 0
    ops, ops_reason = _ops(t) if t.cpu_engine and on_cpu() else (None, "")
    fact = _probe_fact(adapted, cut, config, ops) if t.cache_probes else None
    verified = fact is not None and fact.load() == _VERIFIED
    parts = SplitModel(adapted.model, cut, verified=verified)
    engine, reason = None, None
    if ops is not None:
        engine, reason = _engine(adapted, parts, config, ops, verified)
    # A failure is not cached: its cause may be gone at the next start.
    if fact and not verified and parts.has_separate_head and parts.frozen_blocks == cut and reason is None:
        fact.store(_VERIFIED)
    if engine is not None:
        note = f"CPU engine without native code: {ops_reason}; NumPy computes its kernels" if ops_reason else None
        return CpuBackend(engine, parts, fallback_reason=note)
    return MlxBackend(
        adapted,
        parts,
        chunk=t.loss_chunk,
        all_positions=t.head == "all",
        grad_checkpoint=t.grad_checkpoint,
        compiled=t.compile == "always" or (t.compile == "auto" and not on_cpu()),
        fallback_reason=None if reason is None else f"CPU engine not used: {reason}; MLX computes",
    )


def window_of_earlier_versions(backend: Backend, config: Config) -> int:
    """Return what `data.window: null` meant while the backend chose it: runs of that time keep their order of batches.

    It was 1 (unsorted) with the CPU engine, which computes no padding, and where only dropout ruled the engine out;
    else 64.
    """
    if isinstance(backend, CpuBackend):
        return 1
    t, dropout_alone = config.train, config.lora.dropout > 0
    if not (t.cpu_engine and on_cpu() and dropout_alone):
        return 64
    try:
        Engine(backend.split_model.model, chunk=t.loss_chunk)
    except _UNSUPPORTED:
        return 64
    return 1


def _engine(
    adapted: AdaptedModel, parts: SplitModel, config: Config, ops: Ops, verified: bool
) -> tuple[Engine | None, str | None]:
    """Return the engine, or None and the reason."""
    t = config.train
    unsupported = {
        "lora.dropout is above 0": config.lora.dropout > 0,
        "train.compile=always": t.compile == "always",
        "train.head=all": t.head == "all",
        "this model's head cannot be computed apart": not parts.has_separate_head,
    }
    if reason := next((reason for reason, holds in unsupported.items() if holds), None):
        return None, reason
    try:
        engine = Engine(
            adapted.model,
            chunk=t.loss_chunk,
            threads=blas.load_blas().threads or 1,
            grad_checkpoint=t.grad_checkpoint,
            ops=ops,
        )
    except _UNSUPPORTED as error:
        return None, f"this model has a part that it does not implement: {error}"
    if not (verified or probe.agrees(engine, adapted, parts)):
        return None, "it does not give this model's own gradients"
    return engine, None


def _ops(t: TrainConfig) -> tuple[Ops, str]:
    """Return the kernels of the engine; where these are NumPy's although native ones are wanted, also the reason."""
    kernels, reason = native.load() if t.cpu_native else (None, "")
    return kernels or Ops(), reason


def _probe_fact(adapted: AdaptedModel, cut: int, config: Config, ops: Ops | None) -> CachedResult:
    """Return the cached fact that the parts compute what the whole model does, keyed by all that this depends on."""
    t = config.train
    return CachedResult.of(
        "checks",
        {
            "base": adapted.base.content_hash,
            "cut": cut,
            "lora": asdict(config.lora),
            "train": (t.cpu_engine, t.head, t.loss_chunk, t.grad_checkpoint, t.compile),
            "ops": ops and (ops.name, ops.build),
            "blas": blas.identity(),
            "python": platform.python_version(),
            "code": code_digest(),
            **numeric_platform(),
        },
    )


@cache
def code_digest() -> str:
    """Return the SHA-256 of the modules that compute."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    ours = [Path(str(module.__file__)) for module in (split_model, lora, dropout)]
    for file in sorted((*package.rglob("*.py"), *package.rglob("*.c"), *ours)):
        digest.update(file.read_bytes())
    return digest.hexdigest()
