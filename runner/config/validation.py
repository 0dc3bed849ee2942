"""Checks on values before anything is loaded or written, and what the chosen groups complete."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from runner.common.errors import ConfigError, did_you_mean
from runner.common.text import shorten
from runner.config.schema import DEFAULT_LORA_SCALE, MISSING, OPTIMIZERS, SCHEDULES, Config, LoraConfig, flatten

CHOICES = {
    "model.dtype": ("auto", "float32", "bfloat16", "float16"),
    "model.dequantize": ("auto", "always", "never"),
    "model.quantize.bits": (2, 3, 4, 5, 6, 8),
    "model.quantize.group_size": (32, 64, 128),
    "data.format": ("auto", "text", "completions", "chat"),
    "data.on_too_long": ("truncate", "drop", "error"),
    "data.metric": ("execution_accuracy", "exact_match"),
    "data.metric_split": ("test", "valid"),
    "lora.type": ("lora",),
    "lora.dtype": ("float32", "model"),
    "optimizer.name": tuple(OPTIMIZERS),
    "schedule.name": tuple(SCHEDULES),
    "train.compile": ("auto", "always", "never"),
    "train.head": ("supervised", "all"),
    "checkpoint.result": ("best", "last"),
    "objective.metric": ("valid_loss", "test_loss", "score"),
    "objective.direction": ("minimize", "maximize"),
}
_POSITIVE = (
    "data.max_length",
    "data.pad_to",
    "data.window",
    "data.max_new_tokens",
    "lora.rank",
    "schedule.iters",
    "train.iters",
    "train.batch_size",
    "train.grad_accumulation",
    "train.eval_tokens",
    "train.loss_chunk",
    "train.report_every",
    "train.eval_every",
    "train.early_stopping.patience",
    "checkpoint.every",
    "checkpoint.keep_every",
)
_ABOVE_ZERO = (
    "optimizer.learning_rate",
    "optimizer.eps",
    "train.grad_clip",
    "train.cache_limit_gb",
    "data.cache_gb",
    "checkpoint.every_minutes",
    "lora.alpha",
)
# Beyond any use, and enough to end the process where MLX allocates what it cannot have.
_AT_MOST = {"lora.rank": 16_384, "data.pad_to": 65_536, "train.batch_size": 1_000_000, "train.iters": 10**12}
_PATHS = ("model.path", "data.path", "data.cache_folder", "adapter", "checkpoint.backup", "train.hidden_cache.folder")
_NOT_NEGATIVE = (
    "seed",
    "schedule.warmup",
    "schedule.end",
    "optimizer.weight_decay",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "train.hidden_cache.memory_gb",
    "train.hidden_cache.disk_gb",
    "train.early_stopping.min_delta",
)
_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:"  # at the beginning of a word: risk-assessment is none
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.)"
)


def validate(config: Config) -> None:
    """Check every value of `config` before anything is loaded or written.

    Raises:
        ConfigError: one sentence a problem, all problems at once.
    """
    flat = flatten(config)
    problems: list[str] = []

    def require(name: str, good: Callable[[Any], bool], wants: str) -> None:
        if flat[name] is not None and not good(flat[name]):
            problems.append(f"{name}={flat[name]} cannot be: it has to be {wants}.")

    for name, value in flat.items():
        if value == MISSING:
            problems.append(f"{name} has no value: choose {name.split('.')[0]}=NAME or set it.")
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name}={value} cannot be: it has to be a finite number.")
    for name, choices in CHOICES.items():
        value = flat[name]
        if value is not None and value != MISSING and value not in choices:
            hint = did_you_mean(str(value), [str(c) for c in choices])
            problems.append(f"{name}={value} is not a choice: {', '.join(map(str, choices))}.{hint}")
    for name in _POSITIVE:
        require(name, lambda v: v >= 1, "1 or more")
    for name in _ABOVE_ZERO:
        require(name, lambda v: v > 0, "above 0")
    for name in _NOT_NEGATIVE:
        require(name, lambda v: v >= 0, "0 or more")
    for name in ("lora.num_layers", "data.metric_rows", "train.eval_batches"):
        require(name, lambda v: v >= -1, "-1 (all) or more")
    require("lora.num_layers", lambda v: v != 0, "-1 (all) or at least 1")
    require("train.eval_batches", lambda v: v != 0, "-1 (all) or at least 1")
    require("lora.dropout", lambda v: 0 <= v < 1, "from 0 to below 1")
    require(
        "optimizer.betas",
        lambda v: len(v) == 2 and all(0 <= b < 1 for b in v),
        "two numbers from 0 to below 1",
    )
    require("seed", lambda v: v < 2**63, "below 2**63")
    for name, most in _AT_MOST.items():
        if flat[name] is not None and flat[name] > most:
            problems.append(f"{name}={flat[name]} cannot be: it has to be at most {most:,}.")
    require("data.max_length", lambda v: v >= 2, "2 or more")
    require("checkpoint.dir", _is_plain_folder, "a plain folder name inside the run directory")
    for name in _PATHS:
        if isinstance(flat[name], str) and not _is_path(flat[name]):
            problems.append(f"{name}={shorten(flat[name])} cannot be: it has to be a path or a name.")
    problems += _lora_problems(config.lora)
    problems += _unused_options(config)
    if config.data.metric_rows and config.data.metric is None:
        problems.append("data.metric_rows is set, but data.metric is null: choose data.metric=exact_match or another.")
    if config.objective.metric == "test_loss" and not config.train.test:
        problems.append("objective.metric=test_loss needs train.test=true.")
    if config.objective.metric == "score" and not config.data.metric_rows:
        problems.append("objective.metric=score needs data.metric_rows.")
    end = config.schedule.iters or config.train.iters
    if config.schedule.warmup >= end and config.schedule.warmup:
        problems.append(f"schedule.warmup={config.schedule.warmup} leaves no update before the end at {end}.")
    if problems:
        raise ConfigError("\n".join(problems))


def validate_stop_at(stop_at: int | None, config: Config) -> None:
    """Check the update after which an invocation stops against the length of the run.

    Raises:
        ConfigError: it lies beyond the last update.
    """
    if stop_at is not None and stop_at > config.train.iters:
        raise ConfigError(f"train.stop_at={stop_at} is invalid: must be at most train.iters={config.train.iters}.")


def fill_defaults(config: Config) -> Config:
    """A copy with the defaults of the chosen optimizer, schedule and scale filled in: what is stored in config.yaml."""
    config = copy.deepcopy(config)
    for section, table in ((config.optimizer, OPTIMIZERS), (config.schedule, SCHEDULES)):
        for option, default in table[section.name].items():
            if getattr(section, option) is None:
                setattr(section, option, copy.copy(default))
    if config.lora.scale is None and config.lora.alpha is None:
        config.lora.scale = DEFAULT_LORA_SCALE
    return config


def lora_scale(lora: LoraConfig) -> float:
    """The factor of the update: `scale`, else alpha / rank, with rslora alpha / sqrt(rank)."""
    if lora.alpha is None:
        return DEFAULT_LORA_SCALE if lora.scale is None else lora.scale
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def secrets_in(value: Any, where: str = "") -> Iterator[str]:
    """Dotted names below `value` whose text looks like a token or a private key."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from secrets_in(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from secrets_in(item, f"{where}[{i}]")
    elif isinstance(value, str) and _SECRET.search(value):
        yield where


def refuse_secrets(value: Any, where: str = "") -> None:
    """Refuse a config in which any text looks like a token: it would be stored in the run directory.

    `where` is the dotted name of `value` itself.

    Raises:
        ConfigError: names the setting, never the value.
    """
    for name in secrets_in(value, where):
        raise ConfigError(
            f"{name or 'A word on the command line'} looks like a secret and would be written into the run directory. "
            "Set it in the environment instead: backends read their own variables (HF_TOKEN and the like)."
        )


def _lora_problems(lora: LoraConfig) -> list[str]:
    if lora.scale is not None and lora.alpha is not None:
        return [f"lora.scale={lora.scale} and lora.alpha={lora.alpha} say the same thing twice: set exactly one."]
    if lora.rslora and lora.alpha is None:
        return ["lora.rslora=true needs lora.alpha: scale = alpha / sqrt(rank)."]
    return []


def _unused_options(config: Config) -> list[str]:
    """An option that the chosen optimizer or schedule does not use would silently do nothing: refused instead."""
    problems = []
    for section, chosen, table in (
        ("optimizer", config.optimizer, OPTIMIZERS),
        ("schedule", config.schedule, SCHEDULES),
    ):
        if chosen.name not in table:
            continue
        options = {option for every in table.values() for option in every}
        for option in sorted(options - set(table[chosen.name])):
            if getattr(chosen, option) is not None:
                users = [name for name, every in table.items() if option in every]
                problems.append(
                    f"{section}.{option} is not used by {section}={chosen.name}; it belongs to "
                    f"{' and '.join(f'{section}={u}' for u in users)}."
                )
    if config.optimizer.nesterov and not config.optimizer.momentum:
        problems.append("optimizer.nesterov=true needs optimizer.momentum above 0.")
    return problems


def _is_path(text: str) -> bool:
    """Whether the operating system would take `text` for a path; else it fails wherever it is first looked at."""
    size = len(text.encode(errors="surrogatepass"))
    parts = [len(part.encode(errors="surrogatepass")) for part in text.split("/")]
    unknown_user = text.startswith("~") and os.path.expanduser(text) == text
    return size < 4000 and max(parts) <= 255 and min(text, default=" ") >= " " and not unknown_user


def _is_plain_folder(name: str) -> bool:
    # Names that the run directory has other uses for; case aside, since some file systems fold it.
    taken = ("adapters", "run.log", "config.yaml", "status.json", "metrics.jsonl", "samples.jsonl", "backup.json")
    return bool(re.fullmatch(r"[\w][\w.-]*", name)) and name.lower() not in taken
