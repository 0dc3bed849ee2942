"""The schema: every setting of a run with its type, its default and its meaning.

The dataclasses are the one place where a default lives (a group's YAML holds only what the choice changes); the
line under a field is its documentation, from which docs/config.md is made. Plain Python: no Hydra, no MLX.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runner.common.errors import ConfigError, did_you_mean
from runner.common.text import shorten

# What each optimizer and schedule takes beyond the common options, with its default. Adam's bias correction is on,
# as in the Adam paper (mlx-lm leaves it off, which makes the first updates about three times too large).
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "bias_correction": True},
    "adam": {"betas": [0.9, 0.999], "eps": 1e-8, "bias_correction": True},
    "sgd": {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False},
}
SCHEDULES: dict[str, dict[str, Any]] = {"constant": {}, "linear": {"end": 0.0}, "cosine": {"end": 0.0}}
DEFAULT_LORA_SCALE = 20.0  # as mlx-lm
_LARGEST = 10**300
MISSING = "???"  # has to come from a group (OmegaConf's own mark for it)


@dataclass(kw_only=True)
class QuantizeConfig:
    """Quantize the base while loading it (QLoRA)."""

    bits: int | None = None
    """Bits a weight (2, 3, 4, 5, 6 or 8); null leaves the base as it is."""
    group_size: int = 64
    """Weights that share one scale: 32, 64 or 128."""


@dataclass(kw_only=True)
class ModelConfig:
    """The frozen base model."""

    path: str = MISSING
    """Hub id, folder, .gguf file, or builtin:NAME."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    dtype: str = "auto"
    """auto (float32 on the CPU, the model's own elsewhere), float32, bfloat16 or float16."""
    dequantize: str = "auto"
    """Expand a quantized base: auto (on the CPU only, where quantized products are slow), always, never."""
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    trust_remote_code: bool = False
    """Let a model's own Python code run; counts where it is typed only, never from a file."""


@dataclass(kw_only=True)
class KeysConfig:
    """What the fields of a row are called in your files."""

    text: str = "text"
    """Field of plain text rows."""
    prompt: str = "prompt"
    """Field of the prompt."""
    completion: str = "completion"
    """Field of the completion."""
    messages: str = "messages"
    """Field of the conversation."""


@dataclass(kw_only=True)
class DataConfig:
    """What is learned."""

    path: str = MISSING
    """Folder with train.jsonl, valid.jsonl and test.jsonl, a hub id of such files, or builtin:NAME."""
    format: str = "auto"
    """auto (by the first row's fields), text, completions or chat."""
    keys: KeysConfig = field(default_factory=KeysConfig)
    chat_template: bool = True
    """Render prompts with the tokenizer's chat template, where it has one."""
    mask_prompt: bool = True
    """Learn the answers only, not the prompts (mlx-lm learns both unless told)."""
    max_length: int = 2048
    """Longest row, in tokens."""
    on_too_long: str = "truncate"
    """What happens to a longer row: truncate, drop, or error (names file and line)."""
    pad_to: int | None = None
    """Batches are padded to a multiple of this many tokens; null chooses, for the lengths there are, the 32 widths that
    pad least. Few widths mean few compilations."""
    window: int | None = None
    """Batches whose rows are sorted by length together: larger means less padding and less shuffling. null means 1
    (none sorted) where the engine of the CPU computes the model, which computes no padding, and 64 elsewhere."""
    metric: str | None = None
    """The data set's own metric on generated answers: execution_accuracy, exact_match, or null."""
    metric_split: str = "test"
    """Split whose rows are generated for the metric: test or valid."""
    metric_rows: int = 0
    """Rows to generate before and after training; 0 generates none, -1 all."""
    max_new_tokens: int = 96
    """Longest generated answer, in tokens."""
    cache: bool = True
    """Keep tokenised data on disk, so that the next start maps it."""
    cache_gb: float = 10.0
    """Most that is kept, in GB; what was not used for longest gives way."""
    cache_folder: str | None = None
    """Where it is kept; null means tokens/ in the cache folder (RUNNER_CACHE, else ~/.cache/mlx-runner)."""


@dataclass(kw_only=True)
class LoraConfig:
    """The shape of the adapter."""

    type: str = "lora"
    """Kind of fine-tuning: lora."""
    rank: int = 8
    """Rank of the update."""
    scale: float | None = None
    """Factor of the update, as in mlx-lm (20 where neither scale nor alpha is given)."""
    alpha: float | None = None
    """As in PEFT, instead of scale: scale = alpha / rank."""
    rslora: bool = False
    """With alpha: scale = alpha / sqrt(rank) (rank-stabilised LoRA, arXiv:2312.03732)."""
    dropout: float = 0.0
    """Dropout on the adapter's input, 0 to below 1."""
    num_layers: int = 16
    """Blocks to adapt, counted from the last; -1 means all."""
    keys: list[str] | None = None
    """Names of the layers inside a block (self_attn.q_proj); null means every linear layer."""
    dtype: str = "float32"
    """Numbers that the adapter computes in: float32, or model (the base's own, such as bfloat16: smaller products on a
    GPU). What is learned, saved and averaged is float32 in both."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """How the adapter is updated."""

    name: str = MISSING
    """Set by the group (optimizer=adamw)."""
    learning_rate: float = 1e-4
    """Peak learning rate (mlx-lm's 1e-5 hardly moves an adapter of rank 8)."""
    betas: list[float] | None = None
    """adam, adamw: decay of the two moments."""
    eps: float | None = None
    """adam, adamw: term added to the denominator."""
    weight_decay: float | None = None
    """adamw, sgd: weight decay."""
    bias_correction: bool | None = None
    """adam, adamw: correct the moments' start at zero."""
    momentum: float | None = None
    """sgd: momentum."""
    nesterov: bool | None = None
    """sgd: Nesterov's form of momentum."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate over the updates."""

    name: str = MISSING
    """Set by the group (schedule=cosine)."""
    warmup: int = 0
    """Updates over which the learning rate rises linearly to its peak."""
    iters: int | None = None
    """Update at which the end is reached; null means train.iters."""
    end: float | None = None
    """linear, cosine: learning rate of the last update."""


@dataclass(kw_only=True)
class EarlyStoppingConfig:
    """Stop when the validation loss no longer falls."""

    patience: int | None = None
    """Evaluations in a row without a better loss before stopping; null never stops."""
    min_delta: float = 0.0
    """What counts as better: lower by more than this."""


@dataclass(kw_only=True)
class HiddenCacheConfig:
    """The frozen blocks below the first adapted one, computed once a row and cached."""

    enabled: bool = True
    """Compute them apart and cache their output (nothing to cache with lora.num_layers=-1)."""
    memory_gb: float = 0.25
    """Memory for it, in GB."""
    disk_gb: float = 8.0
    """Disk for it, in GB, shared by all runs: what was not used for longest makes room. 0 uses no disk."""
    folder: str | None = None
    """Folder of its files; null means trunk/ in the cache folder."""
    free_frozen_weights: bool = True
    """Let go of the blocks' weights where a run finds every row on disk; a row that is lost loads them again."""


@dataclass(kw_only=True)
class TrainConfig:
    """How long, in what portions, and what is reported."""

    iters: int = 1000
    """Optimizer updates in all."""
    batch_size: int = 4
    """Rows in a micro-batch."""
    grad_accumulation: int = 1
    """Micro-batches an update, weighted by their tokens."""
    grad_clip: float | None = None
    """Largest gradient norm; null does not clip."""
    grad_checkpoint: bool = False
    """Recompute activations instead of keeping them: less memory, about 1.4 times the time."""
    compile: str = "auto"
    """Compile the step with mx.compile: auto (not on the CPU, where each new shape costs seconds), always, never."""
    report_every: int = 10
    """Updates between reports of the training loss."""
    eval_every: int = 200
    """Updates between evaluations; always also before the first update and at the end."""
    eval_batches: int = -1
    """Batches of an evaluation, the same each time; -1 means all."""
    eval_tokens: int = 2048
    """Positions that an evaluation computes at once: its batches of near lengths are joined up to this many."""
    cache_baseline: bool = True
    """Keep the loss before training in the cache folder: runs on the same base and data compute it once."""
    cache_probes: bool = True
    """Keep in the cache folder that a model's parts and the engine were found to compute what the model computes: the
    same base, settings, machine and code are not probed again."""
    head: str = "supervised"
    """Positions that the head and the loss compute: supervised (those that count), or all."""
    loss_chunk: int = 256
    """Supervised positions whose logits exist at once."""
    hidden_cache: HiddenCacheConfig = field(default_factory=HiddenCacheConfig)
    prefetch: bool = True
    """Prepare the next batch while the step runs."""
    cpu_engine: bool = True
    """On the CPU, compute exponentials and the like in NumPy, which is faster there than MLX's own loops."""
    cpu_native: bool = True
    """In the engine of the CPU, compute what lies between products by code that this machine's C compiler makes once;
    NumPy where it has none."""
    test: bool = False
    """Evaluate the result on the test split at the end."""
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    cache_limit_gb: float | None = None
    """Limit of MLX's cache of freed buffers, in GB; null leaves MLX's own."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the run is saved and which checkpoints stay."""

    every: int | None = 100
    """Updates between saves."""
    every_minutes: float | None = None
    """Also save when this many minutes have passed since the last save."""
    keep_last: int = 3
    """Newest scheduled checkpoints that stay."""
    keep_best: int = 1
    """Best checkpoints by validation loss that stay."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many updates stay for good."""
    result: str = "best"
    """What becomes adapters/: best (by validation loss, where there is one) or last."""
    dir: str = "checkpoints"
    """Folder inside the run directory."""
    background: bool = True
    """Write checkpoints while training goes on; false makes each step wait for its save."""
    backup: str | None = None
    """Folder on a second disk: the best, every keep_every-th and the final checkpoint are mirrored there."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """What the jobs of a sweep are compared by."""

    metric: str = "valid_loss"
    """valid_loss (the best), test_loss (needs train.test) or score (needs data.metric_rows)."""
    direction: str = "minimize"
    """minimize or maximize."""


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    seed: int = 0
    """Decides the data order, the adapter's start and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    loggers: dict[str, Any] = field(default_factory=dict)
    """One key per backend, chosen with loggers=NAME or 'loggers=[NAME,NAME]'."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    adapter: str | None = None
    """Warm start, weights only: .npz, .safetensors or adapter folder."""
    experiment: str | None = None
    """Whole recipe from conf/experiment/."""


GROUPS = ("model", "data", "lora", "optimizer", "schedule", "train", "checkpoint", "loggers", "experiment")
PROVENANCE = ("experiment",)
"""Recorded to say where the settings came from; a later resume or repeat does not inherit it."""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name to value for every leaf of a config section (the free dict of loggers is one leaf)."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f"{prefix}{f.name}"
        out.update(flatten(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value})
    return out


def flatten_dict(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name to value for every leaf of nested dicts, empty ones included."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, Mapping) and value
        out.update(flatten_dict(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return out


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def default_settings() -> dict[str, Any]:
    """Dotted name to default for every setting."""
    return flatten(Config())


def section_names() -> set[str]:
    """Dotted names of the sections."""
    return {n.rpartition(".")[0] for n in default_settings() if "." in n}


def from_dict(data: Mapping[str, Any], where: str) -> Config:
    """A Config from plain nested dicts, such as a stored config.yaml; every key and type is checked.

    Raises:
        ConfigError: an unknown key or a value of a wrong type; names `where`.
    """
    return _build(Config, data, where, "")


def _build(cls: type, data: Any, where: str, prefix: str) -> Any:
    if not isinstance(data, Mapping):
        what = prefix.rstrip(".") or "the file"
        raise ConfigError(f"{where}: {what} has to hold settings, not {shorten(format_value(data))}.")
    hints = typing.get_type_hints(cls, vars(sys.modules[cls.__module__]))
    known = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise ConfigError(f"{where}: there is no setting {prefix}{shorten(key)}.{did_you_mean(str(key), known)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _build(typing.cast(type, hint), value, where, f"{prefix}{key}.")
        else:
            values[key] = _coerce(hint, value, f"{where}: {prefix}{key}")
    return cls(**values)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, str) and "${oc.env:" in value:
        return value  # as it was typed; Hydra resolves it and checks its type
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is list and isinstance(value, list):
        return [_coerce(args[0], v, where) for v in value]
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < _LARGEST else math.inf  # which the checks refuse
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} has to be {getattr(hint, '__name__', hint)}, not {shorten(format_value(value))}.")


def format_value(value: Any) -> str:
    """A value as one would type it."""
    return "null" if value is None else str(value)
