"""The adapter that `runner export` exports: loaded with its base model, averaged where that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from runner.checkpoints.safetensors_file import pack
from runner.cli.commands import adapter_source
from runner.cli.commands.adapter_source import AdapterSource
from runner.cli.commands.load_adapter import load_adapter
from runner.cli.commands.stored_settings import StoredSettings
from runner.common.errors import CheckpointError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS
from runner.export.average import average_updates, padded
from runner.export.export import AverageReport, FidelityReference
from runner.export.export import report_average as measure_average
from runner.export.mlx import check_adapter, export_model
from runner.export.trained_adapter import TrainedAdapter, set_template
from runner.models.arrays import parse_arrays, to_tensors
from runner.models.load import ROUNDED_BY_EARLIER_VERSIONS, BaseModel
from runner.models.lora import AdaptedModel, Params, stored_lora

_LARGEST_CONFIG = 1 << 20  # bytes of adapter_config.json


def load_trained(
    source: AdapterSource,
    averaged: Sequence[AdapterSource],
    settings: StoredSettings,
    *,
    any_base: bool,
    log: Callable[[str], None],
) -> TrainedAdapter:
    """Load the base model and the adapter of `source`, or the average of `averaged`, of which it is one.

    Raises:
        ModelError: the base model is another one, or an adapter does not fit.
        CheckpointError: an adapter is damaged.
    """
    for adapter in averaged or [source]:
        check_adapter(adapter.folder, adapter.adapters, adapter.adapter_config)
    weights, lora = weights_of(source), stored_lora(settings.config.lora)
    config_file = FileSystem().read_file(source.folder / ADAPTER_CONFIG, _LARGEST_CONFIG)
    files = {ADAPTERS: source.adapters, ADAPTER_CONFIG: config_file}
    if averaged:
        weights, lora = average_updates([weights_of(adapter) for adapter in averaged], lora)
        adapter_config = {**source.adapter_config}
        if parameters := adapter_config.get("lora_parameters"):
            adapter_config["lora_parameters"] = {**parameters, "rank": lora.rank}
        files = {
            ADAPTERS: pack(to_tensors(weights), {"format": "mlx"}),
            ADAPTER_CONFIG: json.dumps(adapter_config, indent=1).encode(),
        }

    def adapt(settings: StoredSettings, log: Callable[[str], None]) -> AdaptedModel:
        loaded = load_adapter(source, settings, any_base=any_base, log=log)
        assert loaded.adapted is not None
        if not averaged:
            return loaded.adapted
        loaded.detach()
        adapted = AdaptedModel(loaded.base, lora, settings.config.seed)
        adapted.place(weights)
        adapted.model.eval()
        return adapted

    adapted, kept = adapt(settings, log), _with_stored_quantization(settings)
    expanded = _was_expanded(adapted.base) and kept is not settings
    if expanded and adapted.targets.whole:
        log("the base stays expanded: weights that were trained whole are not quantized again")
        expanded = False
    load_as_stored = (lambda: adapt(kept, lambda line: None)) if expanded else None
    name = "average" if averaged else "run"
    return TrainedAdapter(adapted, weights, lora, settings.config, files, log, load_as_stored, name)


def weights_of(source: AdapterSource) -> Params:
    """Return the adapter's arrays. Raises CheckpointError."""
    return parse_arrays(source.adapters, source=str(source.folder / ADAPTERS))


def report_average(
    trained: TrainedAdapter, reference: FidelityReference, averaged: Sequence[AdapterSource]
) -> AverageReport:
    """Measure the best of the run's checkpoints, or where none was evaluated the newest, beside the average."""
    run = averaged[0].run
    single = adapter_source.find_best(run)
    if single.step is None:
        raise CheckpointError(f"{single.folder}: its manifest names no step.")
    weights = padded(weights_of(single), trained.weights)
    steps = [adapter.step for adapter in averaged if adapter.step is not None]
    return measure_average(trained, reference, steps, single.step, weights)


def export_base(trained: TrainedAdapter, target: Path, *, dequantize: bool) -> None:
    """Write the base model without its adapter as a folder, with the chat template of the run."""
    adapted = trained.take(dequantize=dequantize)
    adapted.remove()
    set_template(adapted.base, trained.config)
    export_model(adapted.base, target)


def _was_expanded(base: BaseModel) -> bool:
    """Return whether loading dequantized the base model, or may have: a GGUF file's types are not known here."""
    is_file = base.folder is None and base.model_path != "builtin:tiny"
    expands = base.precision.get("dequantize") == "always"
    return expands and (is_file or ROUNDED_BY_EARLIER_VERSIONS in base.differs_from_earlier_versions)


def _with_stored_quantization(settings: StoredSettings) -> StoredSettings:
    """Return the settings with which a quantized base stays quantized, also where training dequantized it."""
    if "model.dequantize" in settings.typed:
        return settings
    model = replace(settings.config.model, dequantize="never")
    return replace(settings, config=replace(settings.config, model=model))
