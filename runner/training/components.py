"""The loaded parts of a run: base model, data, adapter, backend, hidden-state caches and baseline."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from runner.backends import blas
from runner.backends.protocol import Backend
from runner.backends.select import select_backend
from runner.common.errors import ConfigError, ModelError
from runner.common.text import count
from runner.config import resume_policy, serialize
from runner.config.schema import METHOD_ANSWERS, Config
from runner.data.tokenize import TokenizedDataset
from runner.models.device import on_cpu
from runner.models.hidden_cache import HiddenStateCaches
from runner.models.load import BaseModel, load_base_model
from runner.models.lora import AdaptedModel, trainable_share
from runner.models.precision import resolve_auto
from runner.models.stock_mlx_lm import stock_problem
from runner.reports.progress import Display
from runner.runs.run_spec import RunSpec
from runner.training.baseline import Baseline
from runner.training.component_loader import ComponentLoader
from runner.training.signals import StopSignals
from runner.training.state_files import RunIdentity


@dataclass
class Components:
    """What a run has loaded before training."""

    base: BaseModel
    data: TokenizedDataset
    adapted: AdaptedModel
    backend: Backend
    caches: HiddenStateCaches | None
    """Hidden states of the frozen blocks; None where nothing is cached."""
    identity: RunIdentity
    baseline: Baseline


def load_components(spec: RunSpec, loader: ComponentLoader, display: Display, stops: StopSignals) -> Components:
    """Load the model and the data, or reuse the loader's last ones, and add the adapter.

    Raises:
        ModelError, DataError: what is wrong and where.
        StopRequested: a signal arrived while the data was tokenized.
    """
    config = spec.config
    base = loader.base(config.model, spec.precision)
    for note in base.notes:
        display.line(note)
    data = loader.data(config, base, stops.check)
    for note in data.notes:
        display.line(note, "yellow")
    _require_splits(config, data)
    if config.data.metric_rows:
        _ = base.tokenizer  # loaded now: a tokenizer that is missing must not fail the run after training
    # The path is the one written in the config: a path from the environment is not stored.
    adapted = AdaptedModel(base, config.lora, config.seed, model_path=spec.stored["model"]["path"])
    try:
        _describe(config, data, adapted, display)
        sampled = config.method.max_new_tokens or 0
        backend = select_backend(adapted, config, (longest_row(data) or 0) + sampled)
        if backend.fallback_reason:
            display.line(backend.fallback_reason)
        caches = None
        if config.method.name != "grpo":  # which trains on rows that are new in each update
            caches = loader.hidden_caches(backend, base, config, display.line)
            _describe_hidden_cache(config, data, adapted, backend, caches, display)
    except BaseException:
        adapted.remove()
        raise
    identity = RunIdentity(
        fingerprints={
            "model": base.fingerprint,
            "data_train": data.train.fingerprint,
            "data_valid": data.valid.fingerprint,
            "config": resume_policy.frozen_fingerprint(config),
            **({"data_mix": data.mixture.fingerprint} if data.mixture else {}),
        },
        numeric_environment=backend.numeric_environment(),
        hyperparameters=serialize.flatten_dict(spec.stored),
        precision=base.precision,
    )
    baseline = loader.baseline(config, base, data, identity.numeric_environment)
    return Components(base, data, adapted, backend, caches, identity, baseline)


def free_frozen_weights(config: Config, components: Components, display: Display) -> None:
    """Free the weights of the frozen blocks if no row needs them: every hidden state is on disk and nothing generates.

    Not for a base model that other jobs share.
    """
    caches, data = components.caches, components.data
    if caches is None or not config.train.hidden_cache.free_frozen_weights or config.data.metric_rows:
        return
    splits = [data.train, data.valid, *([data.test] if config.train.test else [])]
    if not all(caches.for_token_set(token_set).complete() for token_set in splits if len(token_set)):
        return

    def reload() -> nn.Module:
        display.line("cache  entry is gone: reloading the weights of the frozen blocks", "yellow")
        fresh = load_base_model(resolve_auto(config.model, components.base.precision))
        if fresh.content_hash != components.base.content_hash:
            raise ModelError(f"model.path={config.model.path} has changed since the run began.")
        return fresh.model

    freed_bytes = components.backend.free_frozen_weights(reload)
    mx.clear_cache()
    display.line(f"cache  every row is on disk: the weights of the frozen blocks are freed, {freed_bytes / 1e9:.2f} GB")


def _require_splits(config: Config, data: TokenizedDataset) -> None:
    """Refuse before training what would otherwise fail after it."""
    if config.train.test and not len(data.test):
        raise ConfigError("train.test=true: the data has no test split.")
    split = config.data.metric_split
    if config.data.metric_rows and not len(data.test if split == "test" else data.valid):
        raise ConfigError(f"data.metric_rows={config.data.metric_rows}: the data has no {split} rows to answer.")


def longest_row(data: TokenizedDataset) -> int | None:
    """Return the tokens of the longest row of any split; None without rows."""
    return max((int(split.lengths.max()) for split in (data.train, data.valid, data.test) if len(split)), default=None)


def _describe(config: Config, data: TokenizedDataset, adapted: AdaptedModel, display: Display) -> None:
    trainable, total = trainable_share(adapted)
    display.line(
        f"model  {adapted.model_path}: {total / 1e6:.1f}M parameters, {trainable / 1e6:.3f}M trained in "
        f"{adapted.targets.where}"
    )
    if problem := stock_problem(adapted):
        display.line(
            f"model  stock mlx-lm cannot load this adapter: {problem.reason}. After the run: "
            f"python -m runner export RUN --to {problem.export}"
        )
    report = blas.load_blas()
    product = f", {report.kind} BLAS, {report.threads} threads" if report.threads and on_cpu() else ""
    display.line(f"device {'CPU' if on_cpu() else 'GPU'}{product}")
    for split, counts in data.stats.items():
        conversations = "conversation" if counts.split == 1 else "conversations"
        exceptions = [
            f"{number} {outcome}"
            for number, outcome in (
                (counts.truncated, f"cut at {config.data.max_length}"),
                (counts.dropped, "dropped as too long"),
                (counts.prompt_too_long, f"left out: the prompt alone reaches {config.data.max_length}"),
                (counts.unsupervised, "without a supervised token"),
                (counts.split, f"{conversations} rendered turn by turn, a row for each"),
            )
            if number
        ]
        for note in counts.template_notes(split):
            display.line(f"data   {note}", "yellow")
        examples = count(counts.rows, "row")
        if METHOD_ANSWERS[config.method.name] == "pairs":
            examples = f"{count(getattr(data, split).example_count, 'pair')} of answers"
        display.line(
            f"data   {split}: {examples}, {counts.tokens:,} tokens, {counts.supervised:,} supervised, "
            f"longest {counts.longest}" + (f"; {', '.join(exceptions)}" if exceptions else "")
        )
    if not len(data.valid):
        display.line(
            "data   no validation split, the last checkpoint is the result (data.valid_fraction=0.05 cuts one off)",
            "yellow",
        )


def _describe_hidden_cache(
    config: Config,
    data: TokenizedDataset,
    adapted: AdaptedModel,
    backend: Backend,
    caches: HiddenStateCaches | None,
    display: Display,
) -> None:
    frozen = adapted.frozen_blocks
    if caches:
        location = ""
        if on_disk := caches.disk_location(data.train):
            folder, size = on_disk
            location = f", up to {size / 1e9:.1f} GB cached in {folder}"
        count = backend.split_model.frozen_blocks
        display.line(f"cache  hidden states of the first {count} blocks are computed once per row{location}")
    elif frozen and config.train.hidden_cache.enabled:
        reason = f"they cannot be computed separately: {backend.split_model.parts.reason}"
        if config.train.neftune_alpha is not None:
            reason = "train.neftune_alpha adds noise to the embeddings that they read"
        display.line(f"cache  the first {frozen} blocks run in each step, since {reason}")
