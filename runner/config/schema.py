"""The schema: every setting of a run with its type, its default, its metadata and its meaning.

A field holds the default of its setting, also the defaults that depend on the optimizer or the schedule; the string
under it is its documentation. docs/config.md and the default files of conf/ are generated from the fields and from
`reference.GENERATED_CHOICES`, which adds the model and the data of the default run (`python -m
runner.config.reference`). Plain Python: no Hydra, no MLX.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from runner.common.layout import CHECKPOINTS
from runner.config.setting import MISSING, OnResume, PathKind, Setting, metadata_of, section, setting

HIGHER_IS_BETTER = ("score",)
"""Values of objective.metric of which a higher one is better, unless objective.direction says otherwise."""
FREE, PROVENANCE, LABEL = OnResume.FREE, OnResume.PROVENANCE, OnResume.LABEL
DEFAULT_LORA_SCALE = 20.0
"""lora.scale where neither it nor lora.alpha is set, as in mlx-lm."""

FLOATING_POINT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Values of model.quantize.mode with the bits and the group size that each requires."""
AFFINE_GROUP_SIZES = (32, 64, 128)
"""Values of model.quantize.group_size for the mode affine."""


@dataclass(kw_only=True)
class QuantizeConfig:
    """Quantization of the base model while it is loaded (QLoRA)."""

    bits: int | None = setting(None, choices=(2, 3, 4, 5, 6, 8))
    """Bits per weight; null keeps the base model as it is."""
    group_size: int = setting(64, choices=(16, 32, 64, 128))
    """Number of weights that share one scale."""
    # Free, so that runs of before this setting keep their identity: a resume compares the weights' fingerprint.
    mode: str = setting("affine", choices=("affine", *FLOATING_POINT_MODES), on_resume=FREE)
    """Format of the weights: affine (integers with a scale and an offset a group; groups of 32, 64 or 128), or floating
    point with bits and group size of its own: mxfp4 (4 bits, 32), mxfp8 (8, 32), nvfp4 (4, 16)."""


@dataclass(kw_only=True)
class ModelConfig:
    """The frozen base model."""

    # Free, so that a model may move: a resume compares the fingerprint of its weights instead.
    path: str = setting(MISSING, path=PathKind.INPUT, on_resume=FREE, shown_as_result_setting=True, always_shown=True)
    """Hub id, folder, .gguf file or builtin:NAME; a resume requires the same weights."""
    revision: str | None = setting(None, on_resume=FREE)
    """Branch, tag or commit of the hub repository; null means its main branch."""
    dtype: str = setting("auto", choices=("auto", "native", "float32", "bfloat16", "float16"))
    """Data type of the base model; native is the one that it is stored in, auto is float32 on the CPU and native
    elsewhere. What auto chose when the run began is kept when it is resumed on another device."""
    dequantize: str = setting("auto", choices=("auto", "always", "never"))
    """Expand a quantized base model; auto does so on the CPU only, where quantized products are slow, and is kept like
    that of model.dtype."""
    quantize: QuantizeConfig = section(QuantizeConfig)
    trust_remote_code: bool = setting(False, on_resume=FREE)
    """Run Python code that comes with the model; only honoured when typed, never from a file."""


@dataclass(kw_only=True)
class KeysConfig:
    """Names of the fields of a row in the data files."""

    text: str = setting("text")
    """Field of a plain text row."""
    prompt: str = setting("prompt")
    """Field of the prompt."""
    completion: str = setting("completion")
    """Field of the completion."""
    messages: str = setting("messages")
    """Field of the conversation."""
    # Free like everything that only decides the tokens: a resume compares the fingerprints of the rows.
    conversations: str = setting("conversations", on_resume=FREE)
    """Field of the conversation of a ShareGPT row."""
    instruction: str = setting("instruction", on_resume=FREE)
    """Field of the instruction of an Alpaca row."""
    input: str = setting("input", on_resume=FREE)
    """Field of the input of an Alpaca row; a row need not have it."""
    output: str = setting("output", on_resume=FREE)
    """Field of the answer of an Alpaca row."""
    chosen: str = setting("chosen", on_resume=FREE)
    """Field of the better answer of a preference row, on which it is trained."""
    rejected: str = setting("rejected", on_resume=FREE)
    """Field of the worse answer of a preference row, which is not used."""


@dataclass(kw_only=True)
class SplitsConfig:
    """Names of the splits at the source, where they are not train, valid (validation, val, dev, eval) and test."""

    train: str | None = setting(None, on_resume=FREE)
    """Split to train on; at the hub also a slice, such as train[:90%]."""
    valid: str | None = setting(None, on_resume=FREE)
    """Split to evaluate on; at the hub also a slice, such as train[90%:]."""
    test: str | None = setting(None, on_resume=FREE)
    """Split to test on."""


@dataclass(kw_only=True)
class DataConfig:
    """The training, validation and test rows, and how they become tokens and batches."""

    # Free, so that data may move: a resume compares the fingerprints of the rows instead.
    path: str = setting(MISSING, path=PathKind.INPUT, on_resume=FREE, shown_as_result_setting=True, always_shown=True)
    """File or folder of rows (JSON Lines, JSON, CSV or Parquet), hub id, or builtin:NAME."""
    config: str | None = setting(None, on_resume=FREE)
    """Configuration (subset) of the hub data set; of a folder, the subfolder."""
    revision: str | None = setting(None, on_resume=FREE)
    """Branch, tag or commit of the hub data set; null means its main branch."""
    splits: SplitsConfig = section(SplitsConfig)
    # Free: a resume compares the rows and the shares of the sources.
    mix: list[dict[str, Any]] | None = setting(None, on_resume=FREE, shown_as_result_setting=True)
    """Sources to train on together instead of data.path: a list of {path, weight, config, revision, splits, format,
    keys}. The weight is the share of an epoch's rows; without weights, each row comes once an epoch."""
    valid_fraction: float | None = setting(None, above=0, below=1, on_resume=FREE, shown_as_result_setting=True)
    """Share of the training rows to evaluate on where there is no validation split, chosen by a hash of each row."""
    format: str = setting("auto", choices=("auto", "text", "completions", "chat", "sharegpt", "alpaca", "preference"))
    """Format of the rows; auto decides by the fields of the first row."""
    keys: KeysConfig = section(KeysConfig)
    chat_template: bool = setting(True)
    """Render prompts with the tokenizer's chat template, if it has one."""
    system_prompt: str | None = setting(None, on_resume=FREE, shown_as_result_setting=True)
    """Text of a system turn that conversations without one begin with."""
    # Free like the path: a resume compares the fingerprints of the rows that the template makes.
    template: str | None = setting(None, path=PathKind.INPUT, on_resume=FREE, shown_as_result_setting=True)
    """File with a chat template (jinja) to use instead of the tokenizer's."""
    template_args: dict[str, Any] = section(dict, on_resume=FREE, shown_as_result_setting=True)
    """Variables for the chat template, such as enable_thinking or date_string, one key each."""
    template_date: str | None = setting(None, on_resume=FREE)
    """Date (YYYY-MM-DD) given to a chat template that writes today's; null means the day of the run's first start,
    which is stored in the run."""
    mask_prompt: bool = setting(True)
    """Compute the loss on completions only, not on prompts (mlx-lm's default is both)."""
    max_length: int = setting(2048, at_least=2)
    """Maximum length of a row, in tokens."""
    on_too_long: str = setting("truncate", choices=("truncate", "drop", "error"))
    """What to do with a longer row: cut it, leave it out, or refuse the data set."""
    pad_to: int | None = setting(None, at_least=1, at_most=65_536)
    """Pad batches to a multiple of this many tokens; null chooses the 32 widths that pad the data least."""
    # null only in runs of earlier versions: they keep the window of their checkpoints.
    window: int | None = setting(1, at_least=1)
    """Number of batches within which rows are sorted by length: a larger window pads less and shuffles less; 1 does not
    sort."""
    metric: str | None = setting(None, choices=("execution_accuracy", "exact_match"), on_resume=FREE)
    """Metric for generated answers; null scores nothing."""
    metric_split: str = setting("test", choices=("test", "valid"), on_resume=FREE)
    """Split whose prompts are answered for the metric."""
    metric_rows: int = setting(0, at_least=0, minus_one_is_all=True, on_resume=FREE)
    """Number of answers to generate and score before and after training; 0 generates none."""
    max_new_tokens: int = setting(96, at_least=1, on_resume=FREE)
    """Maximum length of a generated answer, in tokens."""
    cache: bool = setting(True, on_resume=FREE)
    """Cache tokenized data on disk, so that the next start maps it into memory."""
    cache_gb: float = setting(10.0, above=0, on_resume=FREE)
    """Size limit of that cache, in GB; the least recently used entries are removed."""
    cache_folder: str | None = setting(None, path=PathKind.OUTPUT, on_resume=FREE)
    """Folder of that cache; null means tokens/ in the cache folder (RUNNER_CACHE, else ~/.cache/mlx-runner)."""


@dataclass(kw_only=True)
class LoraConfig:
    """The shape of the adapter."""

    type: str = setting("lora", choices=("lora",))
    """Method of fine-tuning."""
    rank: int = setting(8, at_least=1, at_most=16_384)
    """Rank of the update matrices."""
    scale: float | None = setting(None)
    """Factor of the update, as in mlx-lm; null means 20 unless alpha is set."""
    alpha: float | None = setting(None, above=0)
    """Numerator of the factor, as in PEFT, instead of scale: scale = alpha / rank."""
    rslora: bool = setting(False)
    """With alpha: scale = alpha / sqrt(rank) (rank-stabilized LoRA, arXiv:2312.03732)."""
    dropout: float = setting(0.0, at_least=0, below=1)
    """Dropout probability on the adapter's input."""
    num_layers: int = setting(16, at_least=1, minus_one_is_all=True)
    """Number of transformer blocks to adapt, counted from the last."""
    keys: list[str] | None = setting(None)
    """Linear layers to adapt inside a block, such as self_attn.q_proj; null means every linear layer."""
    dtype: str = setting("float32", choices=("float32", "model"))
    """Data type that the adapter computes in: float32, or model, the base model's own (smaller products on a GPU);
    weights and optimizer state are float32 in both cases."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer of the adapter's weights."""

    name: str = setting(MISSING, choices=("adamw", "adam", "sgd"))
    """Optimizer; set by the group."""
    learning_rate: float = setting(1e-4, above=0)
    """Peak learning rate (mlx-lm's default of 1e-5 hardly moves an adapter of rank 8)."""
    betas: list[float] | None = setting(
        None, length=2, at_least=0, below=1, defaults_by={"adamw": [0.9, 0.999], "adam": [0.9, 0.999]}
    )
    """Decay rates of the first and the second moment."""
    eps: float | None = setting(None, above=0, defaults_by={"adamw": 1e-8, "adam": 1e-8})
    """Term added to the denominator for numerical stability."""
    bias_correction: bool | None = setting(None, defaults_by={"adamw": True, "adam": True})
    """Correct the moments for their start at zero, as in the Adam paper (mlx-lm's default is not to, which makes the
    first updates about three times too large)."""
    weight_decay: float | None = setting(None, at_least=0, defaults_by={"adamw": 0.01, "sgd": 0.0})
    """Weight decay; decoupled from the gradient with adamw."""
    momentum: float | None = setting(None, defaults_by={"sgd": 0.0})
    """Momentum factor."""
    nesterov: bool | None = setting(None, defaults_by={"sgd": False})
    """Nesterov momentum; needs momentum above 0."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """The learning rate over the updates."""

    name: str = setting(MISSING, choices=("constant", "linear", "cosine", "exponential"))
    """Shape of the schedule; set by the group."""
    warmup: int = setting(0, at_least=0)
    """Number of updates over which the learning rate rises linearly to its peak."""
    iters: int | None = setting(None, at_least=1)
    """Update at which the schedule ends; null means train.iters."""
    end: float | None = setting(None, at_least=0, defaults_by={"linear": 0.0, "cosine": 0.0, "exponential": 1e-6})
    """Learning rate of the last update; must be above 0 with exponential."""


@dataclass(kw_only=True)
class EarlyStoppingConfig:
    """Stopping when the validation loss no longer improves."""

    patience: int | None = setting(None, at_least=1, on_resume=FREE)
    """Number of evaluations in a row without improvement before training stops; null never stops."""
    min_delta: float = setting(0.0, at_least=0, on_resume=FREE)
    """Smallest decrease of the loss that counts as an improvement."""


@dataclass(kw_only=True)
class HiddenCacheConfig:
    """Cache of the hidden states that the frozen blocks below the first adapted block compute for each row."""

    enabled: bool = setting(True, on_resume=FREE)
    """Compute the frozen blocks once per row and cache their output (no effect if all blocks are
    adapted: lora.num_layers=-1)."""
    memory_gb: float = setting(0.25, at_least=0, on_resume=FREE)
    """Size limit in memory, in GB."""
    disk_gb: float = setting(8.0, at_least=0, on_resume=FREE)
    """Size limit on disk, in GB, shared by all runs; the least recently used entries are removed. 0 uses no disk."""
    folder: str | None = setting(None, path=PathKind.OUTPUT, on_resume=FREE)
    """Folder on disk; null means trunk/ in the cache folder (RUNNER_CACHE, else ~/.cache/mlx-runner)."""
    free_frozen_weights: bool = setting(True, on_resume=FREE)
    """Free the weights of the frozen blocks when every row is on disk; they are reloaded if an entry is lost."""


@dataclass(kw_only=True)
class TrainConfig:
    """The training loop: its length, its batches, what is computed how and what is reported."""

    iters: int = setting(1000, at_least=1, at_most=10**12, on_resume=FREE, shown_as_result_setting=True)
    """Number of optimizer updates."""
    epochs: float | None = setting(None, above=0, at_most=10**9, on_resume=FREE, shown_as_result_setting=True)
    """Number of passes over the training rows; where it is set, train.iters is computed from it and stored."""
    batch_size: int = setting(4, at_least=1, at_most=1_000_000)
    """Number of rows in a micro-batch."""
    grad_accumulation: int = setting(1, at_least=1)
    """Number of micro-batches per update, weighted by their supervised tokens."""
    rows_at_once: int | None = setting(None, at_least=1, on_resume=FREE)
    """Rows of a micro-batch to compute at a time, for less memory; null computes all. The gradients of its parts are
    summed, so that an update is the same but for rounding, and for the masks of lora.dropout."""
    grad_clip: float | None = setting(None, above=0)
    """Maximum norm of the gradient; null does not clip."""
    grad_checkpoint: bool = setting(False, on_resume=FREE)
    """Recompute activations in the backward pass: less memory, about 1.4 times the time."""
    compile: str = setting("auto", choices=("auto", "always", "never"), on_resume=FREE)
    """Compile the step with mx.compile; auto does so except on the CPU, where each new shape costs seconds."""
    report_every: int = setting(10, at_least=1, on_resume=FREE)
    """Updates between reports of the training loss."""
    eval_every: int = setting(200, at_least=1, on_resume=FREE)
    """Updates between evaluations, in addition to one before the first update and one at the end."""
    eval_batches: int = setting(-1, at_least=1, minus_one_is_all=True, on_resume=FREE)
    """Number of batches, of train.batch_size rows each, that an evaluation covers."""
    eval_tokens: int = setting(2048, at_least=1, on_resume=FREE)
    """Maximum tokens (padding included) to compute at a time: batches are merged up to it, the rows stay the same."""
    cache_baseline: bool = setting(True, on_resume=FREE)
    """Cache the validation loss before training: runs on the same base model and data compute it once."""
    cache_probes: bool = setting(True, on_resume=FREE)
    """Cache whether the optimized code paths passed their comparison with the plain model, per base model, settings,
    machine and code."""
    head: str = setting("supervised", choices=("supervised", "all"), on_resume=FREE)
    """Positions whose logits are computed: supervised, or all (more memory)."""
    loss_chunk: int = setting(256, at_least=1, on_resume=FREE)
    """Number of supervised positions whose logits are in memory at a time."""
    hidden_cache: HiddenCacheConfig = section(HiddenCacheConfig)
    prefetch: bool = setting(True, on_resume=FREE)
    """Prepare the next batch while the current step runs."""
    cpu_engine: bool = setting(True, on_resume=FREE)
    """On the CPU, compute supported models with the engine of NumPy and BLAS, which is faster there than MLX."""
    cpu_native: bool = setting(True, on_resume=FREE)
    """In that engine, use C code compiled once by this machine's compiler; NumPy if there is no compiler."""
    test: bool = setting(False, on_resume=FREE)
    """Evaluate the result on the test split at the end."""
    early_stopping: EarlyStoppingConfig = section(EarlyStoppingConfig)
    cache_limit_gb: float | None = setting(None, above=0, on_resume=FREE)
    """Limit of MLX's cache of freed buffers, in GB; it is emptied between updates when it is more than half full. null
    means an eighth of the memory that a GPU should work in, because cached buffers stay wired and Metal reclaims them
    only when 95 % of it is used; on the CPU, MLX's own limit."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved, and which are retained."""

    every: int | None = setting(100, at_least=1, on_resume=FREE)
    """Updates between checkpoints; null saves none on schedule."""
    every_minutes: float | None = setting(None, above=0, on_resume=FREE)
    """Also save when this many minutes have passed since the last checkpoint."""
    keep_last: int = setting(3, at_least=0, on_resume=FREE)
    """Number of the most recent scheduled checkpoints to retain."""
    keep_best: int = setting(1, at_least=0, on_resume=FREE)
    """Number of the best checkpoints, by validation loss, to retain."""
    keep_every: int | None = setting(None, at_least=1, on_resume=FREE)
    """Retain every checkpoint at a multiple of this many updates."""
    result: str = setting("best", choices=("best", "last"), on_resume=FREE)
    """Checkpoint that becomes adapters/: the best by validation loss, or the last (also without validation rows)."""
    dir: str = setting(CHECKPOINTS, path=PathKind.RUN_SUBFOLDER)
    """Folder of the checkpoints inside the run directory."""
    background: bool = setting(True, on_resume=FREE)
    """Write checkpoints while training continues; false makes the step wait for its save."""
    backup: str | None = setting(None, path=PathKind.OUTPUT, on_resume=FREE)
    """Folder on a second disk that the best, every keep_every-th and the final checkpoint are copied to."""


@dataclass(kw_only=True)
class ObjectiveConfig:
    """The value by which the jobs of a sweep are compared."""

    metric: str = setting("valid_loss", choices=("valid_loss", "test_loss", "score"), on_resume=FREE)
    """valid_loss means the lowest validation loss of the run; test_loss needs train.test=true; score needs
    data.metric_rows."""
    direction: str | None = setting(None, choices=("minimize", "maximize"), on_resume=FREE)
    """Whether a lower or a higher value is better; null means what the metric says: higher for score."""


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    seed: int = setting(0, at_least=0, at_most=2**63 - 1, report_order=5)
    """Seed of the data order, the initial adapter and dropout."""
    model: ModelConfig = section(ModelConfig, report_order=6)
    data: DataConfig = section(DataConfig, report_order=7)
    lora: LoraConfig = section(LoraConfig, report_order=1, short_names=True)
    optimizer: OptimizerConfig = section(OptimizerConfig, report_order=2, short_names=True)
    schedule: ScheduleConfig = section(ScheduleConfig, report_order=3)
    train: TrainConfig = section(TrainConfig, report_order=4, short_names=True)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    loggers: dict[str, Any] = section(dict, on_resume=FREE)
    """Loggers beside metrics.jsonl, one key each; chosen with loggers=NAME or 'loggers=[NAME,NAME]'."""
    objective: ObjectiveConfig = section(ObjectiveConfig)
    adapter: str | None = setting(None, path=PathKind.INPUT, on_resume=FREE, shown_as_result_setting=True)
    """Adapter that training starts from, weights only: .npz or .safetensors file, or adapter folder."""
    vars: dict[str, Any] = section(dict, on_resume=FREE)
    """Values of one's own for ${vars.NAME} in recipes; they have no meaning by themselves."""
    experiment: str | None = setting(None, on_resume=PROVENANCE)
    """Recipe from conf/experiment/; sets any of the settings above."""
    name: str | None = setting(None, on_resume=LABEL)
    """What to call the run, or the sweep, in listings and loggers; the directory keeps its name. name, tags and note
    change nothing that is computed; a repeat and a branch do not inherit them. `runner label` changes them later."""
    tags: list[str] = setting([], on_resume=LABEL)
    """Words to find the run, or the sweep and its jobs, by: tags=baseline,sql, then runner ls --tag sql."""
    note: str | None = setting(None, on_resume=LABEL)
    """Free text about the run or the sweep, such as why it was started."""


OPEN_SECTIONS = ("loggers", "vars", "data.template_args")
"""Sections whose keys the schema does not name."""
GROUPS = ("model", "data", "lora", "optimizer", "schedule", "train", "checkpoint", "loggers", "experiment")


def walk(config_class: type = Config, prefix: str = "") -> Iterator[tuple[str, Setting, type | None]]:
    """Yield the dotted name and the metadata of every setting and section, and of a section its dataclass."""
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        name, nested = f"{prefix}{f.name}", hints[f.name] if dataclasses.is_dataclass(hints[f.name]) else None
        yield name, metadata_of(f), nested
        if nested is not None:
            yield from walk(nested, f"{name}.")


@cache
def metadata() -> Mapping[str, Setting]:
    """Return the metadata of every setting by its dotted name."""
    return types.MappingProxyType({name: found for name, found, nested in walk() if nested is None})


@cache
def section_metadata() -> Mapping[str, Setting]:
    """Return the metadata of every section by its dotted name."""
    return types.MappingProxyType({name: found for name, found, nested in walk() if nested is not None})


def path_settings() -> dict[str, PathKind]:
    """Return the settings that are paths outside the run directory, with their kind."""
    kinds = {name: found.path for name, found in metadata().items()}
    return {n: kind for n, kind in kinds.items() if kind is not None and kind is not PathKind.RUN_SUBFOLDER}


def provenance_settings() -> list[str]:
    """Return the settings that only record where the others came from."""
    return [name for name, found in metadata().items() if found.on_resume is PROVENANCE]


def label_settings() -> list[str]:
    """Return the settings that are labels: no config stores them."""
    return [name for name, found in metadata().items() if found.on_resume is LABEL]


def choice_options(section_name: str, choice: str) -> dict[str, Any]:
    """Return the options that only some choices of a section use, as `choice` uses them: option to default."""
    prefix = f"{section_name}."
    return {
        name.removeprefix(prefix): found.defaults_by[choice]
        for name, found in metadata().items()
        if name.startswith(prefix) and choice in found.defaults_by
    }
