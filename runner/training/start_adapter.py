"""The adapter that `adapter=` starts a run from."""

from __future__ import annotations

from pathlib import Path

from runner.config.schema import Config
from runner.models.lora import AdaptedModel, Params
from runner.models.peft.config import is_peft_folder
from runner.models.peft.families import find_family
from runner.models.peft.read import fit, read_adapter
from runner.models.warm_start import read_weights, warm_start


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
