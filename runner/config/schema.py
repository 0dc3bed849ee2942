"""The schema: every setting of a run with its type, its default, its metadata and its meaning.

A field holds the default of its setting, also the defaults that depend on the optimizer or the schedule; the string
under it is its documentation. The sections are in input_sections and training_sections. docs/config.md and the default
files of conf/ are generated from the fields and from `reference.GENERATED_CHOICES`, which adds the model and data of
the default run (`python -m runner.config.reference`). Plain Python: no Hydra, no MLX.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from runner.config.input_sections import (
    AFFINE_GROUP_SIZES,
    FLOATING_POINT_MODES,
    DataConfig,
    KeysConfig,
    ModelConfig,
    QuantizeConfig,
    SplitsConfig,
)
from runner.config.setting import MISSING, OnResume, PathKind, Setting, metadata_of, section, setting
from runner.config.training_sections import (
    DEFAULT_LORA_SCALE,
    ENDLESS_SCHEDULES,
    HIGHER_IS_BETTER,
    METHOD_ANSWERS,
    METHOD_MEASURES,
    OBJECTIVE_METRICS,
    CheckpointConfig,
    HiddenCacheConfig,
    LoraConfig,
    MethodConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "AFFINE_GROUP_SIZES",
    "DEFAULT_LORA_SCALE",
    "ENDLESS_SCHEDULES",
    "FLOATING_POINT_MODES",
    "HIGHER_IS_BETTER",
    "METHOD_ANSWERS",
    "METHOD_MEASURES",
    "MISSING",
    "OBJECTIVE_METRICS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "HiddenCacheConfig",
    "KeysConfig",
    "LoraConfig",
    "MethodConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "QuantizeConfig",
    "ScheduleConfig",
    "SplitsConfig",
    "TrainConfig",
]
FREE, PROVENANCE, LABEL = OnResume.FREE, OnResume.PROVENANCE, OnResume.LABEL


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
    method: MethodConfig = section(MethodConfig, report_order=4)
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
GROUPS = ("model", "data", "lora", "optimizer", "schedule", "method", "train", "checkpoint", "loggers", "experiment")


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


@cache
def numeric_settings() -> frozenset[str]:
    """Return the settings whose values are numbers, or null."""

    def names(config_class: type, prefix: str) -> Iterator[str]:
        for name, hint in typing.get_type_hints(config_class).items():
            if dataclasses.is_dataclass(hint):
                yield from names(typing.cast(type, hint), f"{prefix}{name}.")
            elif {hint, *typing.get_args(hint)} & {int, float}:
                yield f"{prefix}{name}"

    return frozenset(names(Config, ""))


def type_of(name: str) -> Any:
    """Return the type of the setting or section `name` (dotted) as the schema has it; None where it has none."""
    hint: Any = Config
    for part in name.split("."):
        hint = typing.get_type_hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    return hint


def number_type(name: str) -> type | None:
    """Return int where the setting `name` is a whole number (or null), float where it is any number, else None.

    What it has as its default, which may be null, does not matter.
    """
    hint = type_of(name)
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((kind for kind in (float, int) if kind in members), None)


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
