"""A composed config checked before anything is loaded or written, and completed: dependent defaults, absolute paths."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from typing import Any

from runner.common.errors import ConfigError, did_you_mean
from runner.common.text import shorten
from runner.config import labels, schema, serialize
from runner.config.foreign_names import explain_foreign
from runner.config.objectives import objective_problems
from runner.config.schema import (
    DEFAULT_LORA_SCALE,
    METHOD_ANSWERS,
    Config,
    DataConfig,
    LoraConfig,
    MethodConfig,
    OptimizerConfig,
    QuantizeConfig,
    ScheduleConfig,
)
from runner.config.setting import MISSING, PathKind, Setting, absolute_path, is_valid_path, metadata_of

_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:"  # at the beginning of a word: not in risk-assessment
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.)"
)

_TEMPLATE_RESERVED = frozenset(
    (
        "messages",
        "conversation",
        "conversations",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
    )
)
"""Arguments of apply_chat_template that are no variables for the template."""


_LAYER_KEY = re.compile(r"[\w.*?-]{1,200}")
_RANK = re.compile(r"(?!0)\d{1,4}|1[0-5]\d{3}|16[0-2]\d{2}|163[0-7]\d|1638[0-4]")
"""A rank, from 1 to 16,384."""

_MIX_KEYS = ("path", "weight", "config", "revision", "splits", "format", "keys")


def validate(config: Config) -> None:
    """Check every value of `config` before anything is loaded or written.

    Raises:
        ConfigError: one sentence per problem, all problems at once.
    """
    values = serialize.flatten(config)
    problems = [
        problem for name, found in schema.metadata().items() for problem in _setting_problems(name, values[name], found)
    ]
    problems += _quantize_problems(config.model.quantize)
    problems += _lora_problems(config)
    problems += _optimizer_problems(config.optimizer)
    problems += _schedule_problems(config)
    for name, section in _choice_sections(config):
        problems += _unused_options(name, section)
    problems += _method_problems(config)
    problems += _evaluation_problems(config)
    problems += objective_problems(config)
    problems += _template_problems(config.data)
    problems += _mix_problems(config.data)
    problems += labels.problems(config.name, config.tags, config.note)
    if problems:
        raise ConfigError("\n".join(problems))


def missing_value(name: str) -> str:
    """Return the sentence for a setting that has no value because its group was not chosen."""
    return f"{name} has no value: choose {name.split('.')[0]}=NAME or set it."


def unknown_setting(name: str, known: Iterable[str], note: str = "") -> str:
    """Return the message for a setting that there is not, with the nearest of the `known` names."""
    if explanation := explain_foreign(name):
        return explanation
    hint = did_you_mean(name, known)
    return f"There is no setting '{name}'{note}.{hint}\nAll settings: python -m runner --cfg job, or docs/config.md"


def fill_defaults(config: Config) -> Config:
    """Return a copy with the defaults of the chosen optimizer, schedule and method and of the LoRA scale filled in."""
    config = copy.deepcopy(config)
    for name, section in _choice_sections(config):
        for option, default in schema.choice_options(name, section.name).items():
            if getattr(section, option) is None:
                setattr(section, option, copy.copy(default))
    if config.lora.scale is None and config.lora.alpha is None and config.lora.type != "full":
        config.lora.scale = lora_scale(config.lora)
    return config


def make_paths_absolute(config: Config) -> None:
    """Replace the paths of `config` in place, by their kind: a resume from another directory finds the same files."""
    values = serialize.flatten(config)
    for name, kind in schema.path_settings().items():
        if values[name] is not None:
            serialize.set_value(config, name, absolute_path(values[name], kind))
    for source in config.data.mix or []:
        source["path"] = absolute_path(source["path"], PathKind.INPUT)


def lora_scale(lora: LoraConfig, rank: int | None = None) -> float:
    """Return the factor of the update: `scale`, or alpha / rank, with rslora alpha / sqrt(rank).

    `rank`: that of the layer, where lora.rank_pattern gives it one of its own.
    """
    if lora.alpha is None:
        return DEFAULT_LORA_SCALE if lora.scale is None else lora.scale
    rank = lora.rank if rank is None else rank
    return lora.alpha / (math.sqrt(rank) if lora.rslora else rank)


def decay_updates(decay: float, iters: int) -> int:
    """Return the number of updates that a schedule.decay is: from 1 on a number, and below 1 a fraction of `iters`."""
    return int(decay) if decay >= 1 else max(1, round(decay * iters))


def secrets_in(value: Any, where: str = "") -> Iterator[str]:
    """Yield the dotted names in `value` whose text looks like a token or a private key."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from secrets_in(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from secrets_in(item, f"{where}[{i}]")
    elif isinstance(value, str) and _SECRET.search(value):
        yield where


def refuse_secrets(value: Any, where: str = "") -> None:
    """Refuse a config in which a text looks like a token: it would be stored in the run directory.

    `where` is the dotted name of `value` itself.

    Raises:
        ConfigError: names the setting, never the value.
    """
    for name in secrets_in(value, where):
        raise ConfigError(
            f"{name or 'A word on the command line'} looks like a secret and would be written into the run directory. "
            "Set it in the environment instead: the libraries read their own variables, such as HF_TOKEN."
        )


def _template_problems(data: DataConfig) -> Iterator[str]:
    if data.template_date is not None:
        try:
            date.fromisoformat(data.template_date)
        except ValueError:
            yield f"data.template_date={data.template_date} is invalid: must be a date such as 2026-11-29."
    for name in sorted(_TEMPLATE_RESERVED.intersection(data.template_args)):
        yield f"data.template_args.{name} is invalid: the row or the run sets it."
    if data.template is not None and not os.path.isfile(os.path.expanduser(data.template)):
        yield f"data.template={data.template} is invalid: there is no such file."
    if not data.chat_template and (data.template is not None or data.template_args):
        yield "data.chat_template=false excludes data.template and data.template_args: no template is used."


def _setting_problems(name: str, value: Any, metadata: Setting) -> Iterator[str]:
    """Check one value against the metadata of its setting."""
    if value == MISSING:
        yield missing_value(name)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name}={value} is invalid: must be a finite number."
    elif value is None:
        return
    elif metadata.path is not None and not is_valid_path(value, metadata.path):
        must = "a path or a name"
        if metadata.path is PathKind.RUN_SUBFOLDER:
            must = "the name of a folder inside the run directory that nothing else uses"
        yield f"{name}={shorten(value)} is invalid: must be {must}."
    elif not metadata.accepts(value):
        hint = did_you_mean(str(value), [str(choice) for choice in metadata.choices])
        yield f"{name}={value} is invalid: must be {metadata.requirement()}.{hint}"


def _quantize_problems(quantize: QuantizeConfig) -> list[str]:
    mode, prefix = quantize.mode, "model.quantize"
    if mode in schema.FLOATING_POINT_MODES:
        bits, group_size = schema.FLOATING_POINT_MODES[mode]
        if (quantize.bits, quantize.group_size) != (bits, group_size):
            return [f"{prefix}.mode={mode} needs {prefix}.bits={bits} {prefix}.group_size={group_size}."]
    elif quantize.bits is not None and quantize.group_size not in schema.AFFINE_GROUP_SIZES:
        sizes = ", ".join(map(str, schema.AFFINE_GROUP_SIZES))
        problem = f"{prefix}.group_size={quantize.group_size} is invalid with {prefix}.mode=affine"
        return [f"{problem}: must be one of {sizes}."]
    return []


def _lora_problems(config: Config) -> Iterator[str]:
    lora = config.lora
    if lora.scale is not None and lora.alpha is not None:
        yield f"lora.scale={lora.scale} and lora.alpha={lora.alpha} both set the factor: set exactly one."
    elif lora.rslora and lora.alpha is None:
        yield "lora.rslora=true needs lora.alpha: scale = alpha / sqrt(rank)."
    for name in ("keys", "modules_to_save", "rank_pattern"):
        for key in getattr(lora, name) or []:
            if not _LAYER_KEY.fullmatch(key.rpartition(":")[0] if name == "rank_pattern" else key):
                example = "v_proj:16" if name == "rank_pattern" else "self_attn.q_proj or layers.20-29.*"
                yield f"lora.{name}: '{shorten(key, 60)}' is invalid: must be a name such as {example}."
            elif name == "rank_pattern" and not _RANK.fullmatch(key.rpartition(":")[2]):
                yield f"lora.rank_pattern: the rank of '{shorten(key, 60)}' is invalid: must be from 1 to 16,384."
    if lora.type == "full":
        unused = {
            "lora.scale": lora.scale,
            "lora.alpha": lora.alpha,
            "lora.dropout": lora.dropout,
            "lora.rank_pattern": lora.rank_pattern,
            "lora.b_lr_ratio": lora.b_lr_ratio,
            "lora.init": None if lora.init == "default" else lora.init,
        }
        for name, value in unused.items():
            if value:
                yield f"{name}={shorten(value, 60)} has no effect with lora.type=full, which has no factors."
    elif lora.init == "pissa":
        if lora.type == "dora" or lora.rank_pattern or config.adapter:
            other = "lora.type=dora" if lora.type == "dora" else "lora.rank_pattern" if lora.rank_pattern else "adapter"
            yield f"lora.init=pissa and {other} exclude each other: choose one."
        if lora_scale(lora) <= 0:
            yield f"lora.init=pissa needs a factor above 0, and lora.scale={lora.scale} is not."


def _optimizer_problems(optimizer: OptimizerConfig) -> list[str]:
    momentum = optimizer.momentum
    if momentum is None:
        momentum = schema.choice_options("optimizer", optimizer.name).get("momentum", 0.0)
    if optimizer.nesterov and not momentum:
        return ["optimizer.nesterov=true needs optimizer.momentum above 0."]
    if optimizer.name == "muon" and not 0 <= momentum < 1:
        return [f"optimizer.momentum={momentum} is invalid with optimizer=muon: must be from 0 to below 1."]
    return []


def _schedule_problems(config: Config) -> list[str]:
    schedule, problems = config.schedule, []
    end = schedule.iters or config.train.iters
    is_known = schedule.iters is not None or config.train.epochs is None  # else the data decides
    if is_known and schedule.warmup >= end and schedule.warmup:
        problems.append(
            f"schedule.warmup={schedule.warmup} leaves no update before the end of the schedule at {end}: "
            f"type schedule.warmup={end - 1}{' or less' if end > 1 else ''}."
        )
    if schedule.name == "exponential" and schedule.end == 0:
        problems.append(f"schedule.end={schedule.end} is invalid with schedule=exponential: must be above 0.")
    if (schedule.decay or 0) > 1 and not float(schedule.decay or 0).is_integer():
        problems.append(f"schedule.decay={schedule.decay} is invalid: must be below 1, or a whole number of updates.")
    updates = end - schedule.warmup
    if is_known and updates > 0:
        problems += _shape_problems(schedule, end, updates)
    return problems


def _shape_problems(schedule: ScheduleConfig, end: int, updates: int) -> Iterator[str]:
    """Check what has to fit into the `updates` from the peak to the `end` of the schedule."""
    if schedule.cycles is not None and schedule.cycles > updates:
        yield f"schedule.cycles={schedule.cycles} is more than the {updates} updates after the warmup."
    decay = schedule.decay
    if decay is not None and decay_updates(decay, end) >= updates > 1:
        yield f"schedule.decay={decay:g} leaves no update at the peak: there are {updates} after the warmup."


def _method_problems(config: Config) -> list[str]:
    method, problems = config.method, []
    if method.name == "grpo" and config.data.metric is None:
        problems.append("method=grpo needs data.metric, which scores the sampled answers: exact_match or another.")
    if METHOD_ANSWERS.get(method.name, "chosen") != "chosen" and not config.data.mask_prompt:
        problems.append(f"method={method.name} compares answers only: data.mask_prompt=false is not possible.")
    if method.name != "sft" and config.train.neftune_alpha is not None:
        problems.append(
            f"train.neftune_alpha is for method=sft: with method={method.name} noise would decide the loss."
        )
    if method.name == "ipo" and method.beta == 0:
        problems.append("method.beta=0 is invalid with method=ipo: must be above 0.")
    return problems


def _evaluation_problems(config: Config) -> list[str]:
    problems = []
    if config.data.metric_rows and config.data.metric is None:
        problems.append("data.metric_rows is set, but data.metric is null: choose data.metric=exact_match or another.")
    return problems


def _mix_problems(data: DataConfig) -> Iterator[str]:
    """Check the sources of data.mix, whose keys the schema does not name."""
    if data.mix is None:
        return
    if not data.mix:
        yield "data.mix is an empty list: name its sources, such as data.mix=[{path: a, weight: 2}, {path: b}]."
    formats = schema.metadata()["data.format"]
    names = {"keys": [f.name for f in dataclasses.fields(schema.KeysConfig)], "splits": ["train", "valid", "test"]}
    for number, source in enumerate(data.mix):
        where = f"data.mix[{number}]"
        if not isinstance(source.get("path"), str):
            yield f"{where} has no path: each source is {{path: …}}, with weight, format and so on where they differ."
        for key, value in source.items():
            if key not in _MIX_KEYS:
                yield f"{where} has no setting '{shorten(key)}'.{did_you_mean(str(key), _MIX_KEYS)}"
            elif key in names and not _is_mapping_of_texts(value, names[key]):
                yield f"{where}.{key} is invalid: must map some of {', '.join(names[key])} to names."
            elif key == "weight" and not (isinstance(value, int | float) and 0 < value < math.inf):
                yield f"{where}.weight={shorten(value)} is invalid: must be a number above 0."
            elif key == "format" and value not in formats.choices:
                yield f"{where}.format={shorten(value)} is invalid: must be {formats.requirement()}."
            elif key in ("config", "revision") and not isinstance(value, str | None):
                yield f"{where}.{key}={shorten(value)} is invalid: must be a text."
    if len({"weight" in source for source in data.mix}) > 1:
        yield "data.mix: some sources have a weight and some have none: give one to all or to none."


def _is_mapping_of_texts(value: Any, names: Iterable[str]) -> bool:
    return isinstance(value, Mapping) and all(k in names and isinstance(v, str) for k, v in value.items())


def _choice_sections(config: Config) -> tuple[tuple[str, OptimizerConfig | ScheduleConfig | MethodConfig], ...]:
    """Return the sections of which some options belong to some choices only, with their names."""
    return ("optimizer", config.optimizer), ("schedule", config.schedule), ("method", config.method)


def _unused_options(name: str, section: OptimizerConfig | ScheduleConfig | MethodConfig) -> Iterator[str]:
    """Refuse an option that the chosen optimizer, schedule or method does not use: it would silently have no effect."""
    if section.name not in schema.metadata()[f"{name}.name"].choices:
        return
    for option in dataclasses.fields(section):
        users = metadata_of(option).defaults_by
        if users and section.name not in users and getattr(section, option.name) is not None:
            belongs = " and ".join(f"{name}={user}" for user in users)
            yield (
                f"{name}.{option.name} is not used by {name}={section.name}; it belongs to {belongs}. (A YAML file "
                f"chooses with '- override /{name}: {section.name}' in its defaults list.)"
            )
