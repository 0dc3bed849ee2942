"""Loading a run's base model with its adapter, after checking that each is what the other was trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from runner.cli.commands.adapter_source import AdapterSource
from runner.cli.commands.stored_settings import NUMERIC_SETTINGS, StoredSettings
from runner.common.errors import ModelError
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS
from runner.config import schema, serialize
from runner.models.arrays import parse_arrays
from runner.models.load import BaseModel, load_base_model
from runner.models.lora import AdaptedModel, Params, stored_lora
from runner.models.precision import ADAPTER_FIELD, on_the_other_device, recorded_precision, resolve_auto

_BASE_FIELDS = ("model", "base_fingerprint", ADAPTER_FIELD)
"""Fields of adapter_config.json that describe the base model, which is compared by its weights."""


@dataclass
class LoadedAdapter:
    """A base model and an adapter, attached to it or detached from it."""

    base: BaseModel
    lora: schema.LoraConfig
    seed: int
    weights: Params
    model: schema.ModelConfig
    """How the base model was loaded, nothing in it `auto`."""
    adapted: AdaptedModel | None = None
    fresh: Params = field(default_factory=dict)
    """The adapter as a new run with these settings begins, set when it is attached."""

    def attach(self) -> AdaptedModel:
        """Attach the adapter to the base model, in evaluation mode.

        Raises:
            ModelError: the weights have other names or shapes than the settings and the base model require.
        """
        adapted = AdaptedModel(self.base, self.lora, self.seed)
        self.fresh = adapted.params()
        try:
            _compare_shapes(self.fresh, self.weights)
        except ModelError:
            adapted.remove()
            raise
        adapted.place(self.weights)
        adapted.model.eval()
        self.adapted = adapted
        return adapted

    def replace(self, source: AdapterSource) -> None:
        """Replace the weights by those of another checkpoint of the same run.

        Raises:
            ModelError: they have other names, shapes or settings.
            CheckpointError: the file is damaged.
        """
        weights = parse_arrays(source.adapters, source=str(source.folder / ADAPTERS))
        assert self.adapted is not None
        _compare_shapes(self.weights, weights)
        _compare_config(self.adapted, source)
        self.weights = weights
        self.adapted.place(weights)
        self.adapted.model.eval()

    def detach(self) -> None:
        """Restore the base model's own layers."""
        if self.adapted is not None:
            self.adapted.remove()
            self.adapted = None


def load_adapter(
    source: AdapterSource,
    settings: StoredSettings,
    *,
    any_base: bool = False,
    log: Callable[[str], None],
    previous: LoadedAdapter | None = None,
) -> LoadedAdapter:
    """Load the base model that `settings` name and attach the adapter of `source` to it.

    Args:
        source: the adapter.
        settings: the run's settings, which may name another copy of the base model.
        any_base: accept a base model with other weights than the adapter was trained on.
        log: called with each line for the user.
        previous: an adapter that is not used any more, whose base model is used where it is the same.

    Raises:
        ModelError: no such model, other weights than the adapter was trained on, or an adapter that does not fit.
        CheckpointError: the adapter's file is damaged.
    """
    weights = parse_arrays(source.adapters, source=str(source.folder / ADAPTERS))
    model = _resolved_model(source, settings)
    base: BaseModel | None = None
    if previous is not None:
        previous.detach()
        fingerprint = source.adapter_config.get("base_fingerprint")
        if previous.model == model and (any_base or previous.base.fingerprint == fingerprint):
            base = previous.base
        del previous.base  # before another is loaded
    base = base or _load_base(source, settings, model, any_base=any_base, log=log)
    loaded = LoadedAdapter(base, stored_lora(settings.config.lora), settings.config.seed, weights, model)
    _compare_config(loaded.attach(), source)
    return loaded


def _resolved_model(source: AdapterSource, settings: StoredSettings) -> schema.ModelConfig:
    """Return the model's settings. What `auto` meant in training it means here, on any device, unless it is typed."""
    recorded = recorded_precision(source.adapter_config.get(ADAPTER_FIELD))
    untyped = {name: value for name, value in recorded.items() if f"model.{name}" not in settings.typed}
    return resolve_auto(settings.config.model, untyped)


def _compare_config(adapted: AdaptedModel, source: AdapterSource) -> None:
    for key, value in adapted.adapter_config().items():
        stored = source.adapter_config.get(key)
        if key not in _BASE_FIELDS and stored != value:
            raise ModelError(
                f"{source.folder / ADAPTER_CONFIG} says {key}: {stored}, but the settings of {source.run} give {value}."
            )


def _load_base(
    source: AdapterSource,
    settings: StoredSettings,
    model: schema.ModelConfig,
    *,
    any_base: bool,
    log: Callable[[str], None],
) -> BaseModel:
    """Load the base model alone; its weights must be those that the adapter was trained on, unless `any_base`."""
    fingerprint = source.adapter_config.get("base_fingerprint")
    recorded = recorded_precision(source.adapter_config.get(ADAPTER_FIELD))
    trained_model = resolve_auto(settings.trained_model, recorded)
    verified = any_base
    if not verified and _numerics(model) != _numerics(trained_model):
        # A fingerprint depends on dtype and quantization, so it is compared as the model was trained.
        trained = load_base_model(trained_model)
        elsewhere = trained.fingerprint != fingerprint and _trained_on_the_other_device(source, settings, recorded)
        if trained.fingerprint != fingerprint and not elsewhere:
            raise ModelError(_different_base(source, settings, trained))
        del trained  # before the other is loaded
        verified = True
    base = load_base_model(model)
    if not verified and base.fingerprint != fingerprint:
        difference = _different_base(source, settings, base)
        del base
        if not _trained_on_the_other_device(source, settings, recorded):
            raise ModelError(difference)
        base = load_base_model(on_the_other_device(settings.trained_model))
    for note in base.notes:
        log(note)
    if any_base and base.fingerprint != fingerprint:
        log(f"{base.model_path} has other weights than the base model that the adapter was trained on (--any-base)")
    return base


def _trained_on_the_other_device(source: AdapterSource, settings: StoredSettings, recorded: Mapping[str, str]) -> bool:
    """Return whether the adapter, which is older than the record of it, was trained on what `auto` means elsewhere."""
    other = on_the_other_device(settings.trained_model)
    if recorded or other == settings.trained_model:
        return False
    return load_base_model(other).fingerprint == source.adapter_config.get("base_fingerprint")


def _numerics(model: schema.ModelConfig) -> list[object]:
    flat = serialize.flatten(model, "model.")
    return [flat[name] for name in NUMERIC_SETTINGS]


def _different_base(source: AdapterSource, settings: StoredSettings, base: BaseModel) -> str:
    fingerprint = source.adapter_config.get("base_fingerprint")
    if not isinstance(fingerprint, str):
        return (
            f"{source.folder / ADAPTER_CONFIG} names no base_fingerprint to compare with; --any-base skips the check."
        )
    return (
        f"{settings.config.model.path} has other weights than the base model that {source.folder} was trained on "
        f"(fingerprint {fingerprint[:16]}). Name the right one with model.path=…; --any-base uses this one."
        + "".join(f" {sentence}" for sentence in base.differs_from_earlier_versions)
    )


def _compare_shapes(params: Params, weights: dict[str, mx.array]) -> None:
    missing, unknown = sorted(set(params) - set(weights)), sorted(set(weights) - set(params))
    problems = [f"{len(missing)} arrays are missing, such as {missing[0]}"] if missing else []
    problems += [f"{len(unknown)} arrays are unknown, such as {unknown[0]}"] if unknown else []
    for name in sorted(set(params) & set(weights)):
        if weights[name].shape != params[name].shape:
            problems.append(f"{name} has shape {weights[name].shape}, but must have {params[name].shape}")
            break
    if problems:
        raise ModelError(f"The adapter does not fit its run's settings and base model: {'; '.join(problems)}.")
