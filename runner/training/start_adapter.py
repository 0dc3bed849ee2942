"""The adapter that `adapter=` starts a run from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.common import layout
from runner.config.schema import Config
from runner.config.serialize import flatten_stored
from runner.models.lora import AdaptedModel, Params
from runner.models.peft.config import is_peft_folder
from runner.models.peft.families import find_family
from runner.models.peft.read import fit, read_adapter
from runner.models.warm_start import read_weights, warm_start
from runner.reports.settings_text import value_text
from runner.runs.inspect import read_run
from runner.runs.lineage import WARM_START, Parent

_MEANING = (
    "model.path",
    "lora.scale",
    "lora.alpha",
    "lora.rslora",
    "data.chat_template",
    "data.template",
    "data.system_prompt",
)
"""Settings that weights do not hold: with others than they were trained with, they compute something else, or are asked
in another way than they learned."""


def warm_started_params(config: Config, params: Params, adapted: AdaptedModel) -> Params:
    """Return the weights of `config.adapter`, which have to fit `params`, those of `adapted` before training.

    Raises:
        ModelError: they cannot be read, or do not fit.
        CheckpointError: an invalid .safetensors file.
    """
    path = Path(config.adapter or "")
    if is_peft_folder(path):
        adapter = read_adapter(path, find_family(adapted.base.config.get("model_type")))
        weights = fit(adapter, params, config.lora, path, tied=adapted.is_tied)
    else:
        weights = read_weights(path, fitting=params)
    return warm_start(params, weights, str(path))


def settings_that_differ(adapter: str, stored: Mapping[str, Any]) -> str:
    """Return in one line what the run that `adapter` comes from was trained with and `stored` has otherwise.

    Empty where nothing differs, and where the adapter lies in no run's directory. `stored` is a config as config.yaml
    holds it.
    """
    source = Parent(WARM_START, Path(adapter).expanduser().absolute()).run
    if is_peft_folder(Path(adapter)) or not (source / layout.CONFIG).is_file():
        return ""
    run, present = read_run(source), flatten_stored(stored)
    differing = [name for name in _MEANING if run.settings and run.setting(name) != present.get(name)]
    texts = {name: (value_text(run.setting(name)), value_text(present.get(name))) for name in differing}
    return ", ".join(f"{name}={former} (here {here})" for name, (former, here) in texts.items())
