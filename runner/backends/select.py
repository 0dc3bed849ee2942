"""Choose the backend of a run, once, from its settings, its model and the device."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from runner.backends import blas
from runner.backends.cpu import native, probe
from runner.backends.cpu.backend import CpuBackend
from runner.backends.cpu.engine import Engine
from runner.backends.cpu.kernels import Ops
from runner.backends.cpu.linear import UnsupportedModel
from runner.backends.mlx.backend import MlxBackend
from runner.backends.mlx.embedding_noise import EmbeddingNoise
from runner.backends.mlx.probe import GradientProbe
from runner.backends.protocol import Backend
from runner.common.errors import ConfigError
from runner.common.result_cache import CachedResult
from runner.config.schema import Config
from runner.models import split_probe
from runner.models.device import on_cpu
from runner.models.hidden_cache import numeric_platform
from runner.models.lora import AdaptedModel
from runner.models.split_model import Parts, SplitModel

_MODEL_FILES = (
    "split_model.py",
    "split_probe.py",
    "stand_in.py",
    "lora.py",
    "adapter_layers.py",
    "adapter_targets.py",
    "dropout.py",
)
_UNSUPPORTED = (UnsupportedModel, AttributeError)  # another version of mlx-lm may rename parts of its models


@dataclass(frozen=True)
class Choice:
    """Whether the CPU engine computes a run, and if not, why."""

    engine: Engine | None = None
    """None where MLX computes."""
    reason: str | None = None
    """Why the engine cannot compute the run; None where it does or is not wanted."""


def select_backend(adapted: AdaptedModel, config: Config, longest_row: int | None = None) -> Backend:
    """Return the CPU engine where it can compute this run, else MLX.

    Verified on probes: that the parts of the split model compute what the whole model does, on rows as long as
    `longest_row` (`data.max_length` by default), and that their loss and gradients, or the engine's, are those that
    MLX gives. The result is cached for the same model, settings, length, machine and code.

    Raises:
        ModelError: MLX cannot train this model, or not with this adapter.
        ConfigError: a setting that this model does not allow.
    """
    t = config.train
    frozen_blocks = _cached_blocks(adapted, config)
    length = min(longest_row or config.data.max_length, config.data.max_length)
    ops: Ops | None = None
    not_native = ""
    if t.cpu_engine and on_cpu():
        ops, not_native = native.load() if t.cpu_native else (None, "")
        ops = ops or Ops()
    choice = _choose(adapted, config, ops) if ops else Choice()
    if choice.engine is not None:
        probed = _Probed.of(adapted, frozen_blocks, split_probe.SHORT, config, ops)
        split_model = SplitModel(adapted.model, probed.parts) if probed.parts else None
        if split_model is None:
            split_model = split_probe.split(adapted.model, frozen_blocks)
            agrees = split_model.has_separate_head and probe.agrees(choice.engine, adapted, split_model)
            if agrees and split_model.frozen_blocks == frozen_blocks:
                probed.store(split_model.parts)  # a failure is not cached: its cause may be gone at the next start
            if not agrees:
                choice = Choice(reason="its gradients differ from MLX's for this model")
        if choice.engine is not None:
            note = f"the CPU engine uses NumPy instead of compiled C code: {not_native}" if not_native else None
            return CpuBackend(choice.engine, split_model, fallback_reason=note)
    return _mlx_backend(adapted, frozen_blocks, length, config, choice.reason)


def unverified_backend(adapted: AdaptedModel, config: Config) -> Backend:
    """Return the backend that `select_backend` returns where all probes agree; nothing is computed.

    For questions about shapes: the weights of the model need not be there.

    Raises:
        ModelError: MLX cannot train this model, or not with this adapter.
    """
    t = config.train
    frozen_blocks = _cached_blocks(adapted, config)
    try:
        parts = split_probe.unverified_parts(adapted.model, frozen_blocks)
        if _is_one_piece(adapted, config):
            parts = replace(parts, trunk=None)
        split_model = SplitModel(adapted.model, parts)
    except Exception as error:  # models and MLX raise all kinds of errors
        raise adapted.explain(error) from error
    if t.cpu_engine and on_cpu() and (engine := _choose(adapted, config, Ops()).engine):
        return CpuBackend(engine, split_model)
    return MlxBackend(
        adapted,
        split_model,
        chunk=t.loss_chunk,
        all_positions=t.head == "all",
        grad_checkpoint=t.grad_checkpoint,
        compiled=t.compile == "always" or (t.compile == "auto" and not on_cpu()),
        embedding_noise=_embedding_noise(adapted, config),
    )


def _cached_blocks(adapted: AdaptedModel, config: Config) -> int:
    """Return the number of frozen blocks whose output is to be cached: none where noise is added below them."""
    if not config.train.hidden_cache.enabled or config.train.neftune_alpha is not None:
        return 0
    return adapted.frozen_blocks


def _is_one_piece(adapted: AdaptedModel, config: Config) -> bool:
    """Return whether all logits are computed together: in chunks, dropout on the head would repeat its mask."""
    return adapted.trains_head and config.lora.dropout > 0


def _embedding_noise(adapted: AdaptedModel, config: Config) -> EmbeddingNoise | None:
    alpha = config.train.neftune_alpha
    return None if alpha is None else EmbeddingNoise(adapted, alpha)


def _choose(adapted: AdaptedModel, config: Config, ops: Ops) -> Choice:
    """Decide by the settings, then by the model, whether the engine may compute the run."""
    t, lora = config.train, config.lora
    unsupported = {
        f"lora.type={lora.type}": lora.type != "lora",
        f"lora.init={lora.init}": lora.init != "default",
        "lora.modules_to_save is set": bool(adapted.targets.whole),
        f"an adapter on {', '.join(sorted(adapted.targets.outside))}": bool(adapted.targets.outside),
        "lora.dropout is above 0": lora.dropout > 0,
        "train.neftune_alpha is set": t.neftune_alpha is not None,
        "train.compile=always": t.compile == "always",
        "train.head=all": t.head == "all",
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
    return Choice(engine)


def _mlx_backend(
    adapted: AdaptedModel, frozen_blocks: int, length: int, config: Config, not_engine: str | None
) -> MlxBackend:
    """Return MLX with the parts that the model allows; `not_engine`: why the CPU engine does not compute the run."""
    t = config.train
    compiled = t.compile == "always" or (t.compile == "auto" and not on_cpu())
    notes = [f"using MLX instead of the CPU engine: {not_engine}"] if not_engine else []
    probed = _Probed.of(adapted, frozen_blocks, length, config, None)

    def backend(
        parts: Parts,
        *,
        grad_checkpoint: bool = t.grad_checkpoint,
        compiled: bool = False,
        embedding_noise: EmbeddingNoise | None = None,
    ) -> MlxBackend:
        return MlxBackend(
            adapted,
            SplitModel(adapted.model, parts),
            chunk=t.loss_chunk,
            all_positions=t.head == "all",
            grad_checkpoint=grad_checkpoint,
            compiled=compiled,
            fallback_reason="; ".join(notes) or None,
            embedding_noise=embedding_noise,
        )

    parts, can_compile = probed.parts, probed.can_compile
    if parts is None:
        try:
            parts = split_probe.find_parts(adapted.model, frozen_blocks, length)
            if _is_one_piece(adapted, config):
                parts = replace(parts, trunk=None)
            gradients = GradientProbe(adapted)
        except Exception as error:  # models and MLX raise all kinds of errors
            raise adapted.explain(error) from error
        if t.grad_checkpoint and not gradients.calls_blocks:
            raise ConfigError(_NO_CHECKPOINTING.format("its blocks are not called as units that could be recomputed"))
        if not gradients.agrees(backend(parts, grad_checkpoint=False)):
            parts = Parts(reason="the gradients above them differ from the whole model's" if frozen_blocks else None)
        if t.grad_checkpoint and not gradients.agrees(backend(parts)):
            raise ConfigError(_NO_CHECKPOINTING.format("its gradients would be wrong"))
        can_compile = not compiled or gradients.can_compile(backend(parts, compiled=True))
        probed.store(parts, can_compile)
    if compiled and not can_compile:
        if t.compile == "always":
            raise ConfigError(
                "train.compile=always: this model evaluates arrays while it computes, so that its step cannot be "
                "compiled. Set train.compile=never"
            )
        notes.append("train.compile: the step of this model cannot be compiled and runs eagerly")
    # The probes compare with the whole model, which has no noise.
    return backend(parts, compiled=compiled and can_compile, embedding_noise=_embedding_noise(adapted, config))


_NO_CHECKPOINTING = "train.grad_checkpoint=true is not possible with this model: {}. Set train.grad_checkpoint=false"


@dataclass(frozen=True)
class _Probed:
    """The cached result of the probes."""

    entry: CachedResult | None
    """None where train.cache_probes=false."""
    parts: Parts | None = None
    """None where there is no result yet."""
    can_compile: bool = True

    @classmethod
    def of(cls, adapted: AdaptedModel, frozen_blocks: int, length: int, config: Config, ops: Ops | None) -> _Probed:
        """Return the result for everything that it depends on; `ops`: the engine's kernels, None where MLX computes."""
        t = config.train
        if not t.cache_probes:
            return cls(None)
        entry = CachedResult.of(
            "checks",
            {
                "base": adapted.base.content_hash,
                "frozen_blocks": frozen_blocks,
                "length": length,
                "lora": asdict(config.lora),
                "train": (t.cpu_engine, t.head, t.loss_chunk, t.grad_checkpoint, t.compile),
                "ops": ops and (ops.name, ops.build),
                "blas": blas.identity(),
                "python": platform.python_version(),
                "code": code_digest(),
                **numeric_platform(),
            },
        )
        try:
            values = entry.load() or {}
            return cls(entry, Parts.from_values(values["parts"]), bool(values["can_compile"]))
        except (KeyError, TypeError):
            return cls(entry)

    def store(self, parts: Parts, can_compile: bool = True) -> None:
        """Cache a result."""
        if self.entry is not None:
            self.entry.store({"parts": asdict(parts), "can_compile": can_compile})


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


@cache
def code_digest() -> str:
    """Return the SHA-256 of the modules that compute."""
    package = Path(__file__).parent
    models = (package.parent / "models" / name for name in _MODEL_FILES)
    digest = hashlib.sha256()
    for file in sorted((*package.rglob("*.py"), *package.rglob("*.c"), *models)):
        digest.update(file.read_bytes())
    return digest.hexdigest()
