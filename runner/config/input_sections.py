"""Sections of the schema for what a run reads: the base model and the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runner.config.setting import MISSING, OnResume, PathKind, section, setting

FREE = OnResume.FREE
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
    """Field of the better answer of a preference row."""
    rejected: str = setting("rejected", on_resume=FREE)
    """Field of the worse answer of a preference row, which the methods on pairs use."""
    label: str = setting("label", on_resume=FREE)
    """Field that says whether the answer is a good one (true) or a bad one (false), for method=kto."""


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
