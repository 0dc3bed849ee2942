"""Choose the backend of a run, once, from its settings, its model and the device."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from runner.backends import blas
from runner.backends.cpu import native, probe
from runner.backends.cpu.backend import CpuBackend
from runner.backends.cpu.engine import Engine
from runner.backends.cpu.kernels import Ops
from runner.backends.cpu.linear import UnsupportedModel
from runner.backends.mlx.backend import MlxBackend
from runner.backends.protocol import Backend
from runner.common.result_cache import CachedResult
from runner.config.schema import Config
from runner.models.device import on_cpu
from runner.models.hidden_cache import numeric_platform
from runner.models.lora import AdaptedModel
from runner.models.split_model import SplitModel

_VERIFIED = {"agrees": True}
_UNSUPPORTED = (UnsupportedModel, AttributeError)  # another version of mlx-lm may rename parts of its models


@dataclass(frozen=True)
class Choice:
    """Whether the CPU engine computes a run, and if not, why."""

    engine: Engine | None = None
    """None where MLX computes."""
    reason: str | None = None
    """Why the engine cannot compute the run; None where it does or is not wanted."""


def select_backend(adapted: AdaptedModel, config: Config) -> Backend:
    """Return the CPU engine where it can compute this run, else MLX.

    Two things are verified on a probe: that the parts of the split model compute what the whole model does, and that
    the engine gives MLX's loss and gradients. The result is cached for the same model, settings, machine and code.
    """
    t = config.train
    frozen_blocks = len(adapted.model.layers) - adapted.num_layers if t.hidden_cache.enabled else 0
    ops: Ops | None = None
    not_native = ""
    if t.cpu_engine and on_cpu():
        ops, not_native = native.load() if t.cpu_native else (None, "")
        ops = ops or Ops()
    probe_result = _cached_probe_result(adapted, frozen_blocks, config, ops) if t.cache_probes else None
    verified = probe_result is not None and probe_result.load() == _VERIFIED
    split_model = SplitModel(adapted.model, frozen_blocks, verified=verified)
    choice = _choose(adapted, split_model, config, ops, verified) if ops else Choice()
    is_split = split_model.has_separate_head and split_model.frozen_blocks == frozen_blocks
    # A failure is not cached: its cause may be gone at the next start.
    if probe_result and not verified and is_split and choice.reason is None:
        probe_result.store(_VERIFIED)
    return _build(choice, adapted, split_model, config, not_native)


def _choose(adapted: AdaptedModel, split_model: SplitModel, config: Config, ops: Ops, verified: bool) -> Choice:
    """Decide whether the engine computes the run: by its settings, then by its model, then by the probe."""
    t = config.train
    unsupported = {
        "lora.dropout is above 0": config.lora.dropout > 0,
        "train.compile=always": t.compile == "always",
        "train.head=all": t.head == "all",
        "the head of this model cannot be computed separately": not split_model.has_separate_head,
    }
    for reason, applies in unsupported.items():
        if applies:
            return Choice(reason=reason)
    try:
        engine = Engine(
            adapted.model,
            chunk=t.loss_chunk,
            threads=blas.load_blas().threads or 1,
            grad_checkpoint=t.grad_checkpoint,
            ops=ops,
        )
    except _UNSUPPORTED as error:
        return Choice(reason=f"it does not support a part of this model: {error}")
    if not (verified or probe.agrees(engine, adapted, split_model)):
        return Choice(reason="its gradients differ from MLX's for this model")
    return Choice(engine)


def _build(choice: Choice, adapted: AdaptedModel, split_model: SplitModel, config: Config, not_native: str) -> Backend:
    """Return the chosen backend; `not_native`: why NumPy computes the engine's kernels although C was asked for."""
    t = config.train
    if choice.engine is not None:
        note = f"the CPU engine uses NumPy instead of compiled C code: {not_native}" if not_native else None
        return CpuBackend(choice.engine, split_model, fallback_reason=note)
    return MlxBackend(
        adapted,
        split_model,
        chunk=t.loss_chunk,
        all_positions=t.head == "all",
        grad_checkpoint=t.grad_checkpoint,
        compiled=t.compile == "always" or (t.compile == "auto" and not on_cpu()),
        fallback_reason=choice.reason and f"using MLX instead of the CPU engine: {choice.reason}",
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


def _cached_probe_result(adapted: AdaptedModel, frozen_blocks: int, config: Config, ops: Ops | None) -> CachedResult:
    """Return the cache entry of the probes' result, keyed by everything that it depends on."""
    t = config.train
    return CachedResult.of(
        "checks",
        {
            "base": adapted.base.content_hash,
            "frozen_blocks": frozen_blocks,
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
    package = Path(__file__).parent
    models = (package.parent / "models" / name for name in ("split_model.py", "lora.py", "dropout.py"))
    digest = hashlib.sha256()
    for file in sorted((*package.rglob("*.py"), *package.rglob("*.c"), *models)):
        digest.update(file.read_bytes())
    return digest.hexdigest()
