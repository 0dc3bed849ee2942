"""A run's base model with its adapter on it, each checked against what the adapter says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import mlx.core as mx

from runner.cli.commands.adapter_source import AdapterSource
from runner.cli.commands.stored_settings import NUMERICS, StoredSettings
from runner.common.errors import ModelError
from runner.config import schema
from runner.models.arrays import parse_arrays
from runner.models.device import on_cpu
from runner.models.load import BaseModel, load_base_model
from runner.models.lora import AdaptedModel, Params
from runner.runs.layout import ADAPTER_CONFIG, ADAPTERS

_ABOUT_THE_BASE = ("model", "base_fingerprint")


@dataclass
class LoadedAdapter:
    """A base model and an adapter, which is on it or off it."""

    base: BaseModel
    lora: schema.LoraConfig
    seed: int
    weights: Params
    adapted: AdaptedModel | None = field(default=None)

    def put_on(self) -> AdaptedModel:
        """Put the adapter on the base.

        Raises:
            ModelError: the weights have other names or shapes than the settings and the base make.
        """
        adapted = AdaptedModel(self.base, self.lora, self.seed)
        try:
            _compare(adapted.params(), self.weights)
        except ModelError:
            adapted.remove()
            raise
        adapted.place(self.weights)
        adapted.model.eval()
        self.adapted = adapted
        return adapted

    def take_off(self) -> None:
        """Give the base its own layers back."""
        if self.adapted is not None:
            self.adapted.remove()
            self.adapted = None


def load_adapted(
    place: AdapterSource, settings: StoredSettings, *, any_base: bool = False, say: Callable[[str], None]
) -> LoadedAdapter:
    """The base model that the settings name with the adapter of `place` on it.

    Args:
        place: the adapter.
        settings: the run's settings, which may name another copy of the base.
        any_base: take a base of other weights than the adapter was trained on.
        say: called with each line worth saying.

    Raises:
        ModelError: no such model, other weights than the adapter was trained on, or an adapter that does not fit.
        CheckpointError: the adapter's file is damaged.
    """
    weights = parse_arrays(place.adapters, source=str(place.folder / ADAPTERS))
    base = load_base(place, settings, any_base=any_base, say=say)
    loaded = LoadedAdapter(base, settings.config.lora, settings.config.seed, weights)
    adapted = loaded.put_on()
    said = {key: value for key, value in adapted.adapter_config().items() if key not in _ABOUT_THE_BASE}
    for key, value in said.items():
        if place.about.get(key) != value:
            raise ModelError(
                f"{place.folder / ADAPTER_CONFIG} says {key}: {place.about.get(key)}, but by the settings of "
                f"{place.run} it is {value}."
            )
    return loaded


def load_base(
    place: AdapterSource, settings: StoredSettings, *, any_base: bool, say: Callable[[str], None]
) -> BaseModel:
    """The base model alone, its weights those that the adapter was trained on (or any, with `any_base`).

    Raises:
        ModelError: no such model, or other weights.
    """
    wanted, model = place.about.get("base_fingerprint"), settings.config.model
    known = any_base
    if not known and _numbers(model) != _numbers(settings.as_trained):
        # The fingerprint is of the numbers in memory: those of the training, not those asked for now.
        known = load_base_model(settings.as_trained).fingerprint == wanted
        if not known:
            raise ModelError(_other_base(place, settings))
    base = load_base_model(model)
    if not known and base.fingerprint != wanted:
        cpu = _as_on_the_cpu(model)
        if on_cpu() or cpu == model or load_base_model(cpu).fingerprint != wanted:
            raise ModelError(_other_base(place, settings))
    for note in base.notes:
        say(note)
    if any_base and base.fingerprint != wanted:
        say(f"{base.source} has other weights than the base that the adapter was trained on (--any-base)")
    return base


def _numbers(model: schema.ModelConfig) -> list[object]:
    flat = schema.flatten(model, "model.")
    return [flat[name] for name in NUMERICS]


def _as_on_the_cpu(model: schema.ModelConfig) -> schema.ModelConfig:
    """What `auto` means on the CPU: a run that was trained there has the fingerprint of these numbers."""
    dtype = "float32" if model.dtype == "auto" else model.dtype
    return replace(model, dtype=dtype, dequantize="always" if model.dequantize == "auto" else model.dequantize)


def _other_base(place: AdapterSource, settings: StoredSettings) -> str:
    wanted = place.about.get("base_fingerprint")
    if not isinstance(wanted, str):
        return f"{place.folder / ADAPTER_CONFIG} names no base_fingerprint to compare with; --any-base goes without."
    return (
        f"{settings.config.model.path} has other weights than the base that {place.folder} was trained on "
        f"(fingerprint {wanted[:16]}). Name the right one with model.path=…; a run trained on a GPU keeps the model's "
        "own dtype: model.dtype=bfloat16 model.dequantize=never. --any-base takes this one."
    )


def _compare(params: Params, weights: dict[str, mx.array]) -> None:
    missing, unknown = sorted(set(params) - set(weights)), sorted(set(weights) - set(params))
    problems = [f"{len(missing)} arrays are missing, such as {missing[0]}"] if missing else []
    problems += [f"{len(unknown)} arrays fit nowhere, such as {unknown[0]}"] if unknown else []
    shapes = ((name, weights[name].shape, params[name].shape) for name in sorted(set(params) & set(weights)))
    problems += [f"{name} has shape {ours}, here {here}" for name, ours, here in shapes if ours != here][:1]
    if problems:
        raise ModelError(f"The adapter does not fit its run's settings and base: {'; '.join(problems)}.")
