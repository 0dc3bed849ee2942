"""`--to fused`: a model folder with the adapter merged, and `--to mlx`: an adapter folder, both for stock mlx-lm."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from runner.checkpoints.safetensors_file import pack
from runner.common.errors import ModelError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS
from runner.common.text import first_line
from runner.config.validation import lora_scale
from runner.export.average import padded
from runner.export.fidelity import EXACT_LIMIT, ROUNDED_LIMIT, FidelityRows, Measured, limit_of
from runner.export.mlx import write_verified_folder
from runner.export.target import Target, load_written
from runner.export.trained_adapter import TrainedAdapter
from runner.models.arrays import to_tensors
from runner.models.lora import AdaptedModel, Params
from runner.models.stock_mlx_lm import stock_problem
from runner.models.warm_start import warm_start

_FACTORS = (".lora_a", ".lora_b", ".m")
"""Ends of the names of the arrays that mlx-lm's adapter layers have."""


class FusedTarget(Target):
    """`--to fused`; `path` is the name that the folder will have."""

    limit = ROUNDED_LIMIT
    """Until `write` knows the types that it writes."""

    def __init__(self, path: Path, *, dequantize: bool) -> None:
        self._path, self._dequantize = path, dequantize

    def write(self, trained: TrainedAdapter, path: Path) -> None:
        """Write the folder and check that stock mlx-lm reads the same weights, tokens and settings from it."""
        fused = trained.fuse(dequantize=self._dequantize)
        if fused.config.get("quantization"):
            trained.log("the base stays quantized, which rounds the merged layers; --dequantize avoids it")
        write_verified_folder(fused, path, self._path)
        arrays = [array for _, array in tree_flatten(fused.model.parameters())]
        self.limit = limit_of(str(array.dtype).rpartition(".")[2] for array in arrays)

    def measure(self, trained: TrainedAdapter, path: Path, rows: FidelityRows) -> Measured:
        """Load the folder as `model.path` does."""
        return rows.measure_model(load_written(path, trained.config))


class MlxTarget(Target):
    """`--to mlx`."""

    limit = EXACT_LIMIT

    def write(self, trained: TrainedAdapter, path: Path) -> None:
        """Write the adapter's files; layers of several ranks are filled up to the largest.

        Raises:
            ModelError: mlx-lm cannot load such an adapter.
        """
        assert trained.adapted is not None
        if problem := stock_problem(trained.adapted):
            if problem.export != "mlx":
                raise ModelError(
                    f"mlx-lm {version('mlx-lm')} cannot load this adapter: {problem.reason}. --to {problem.export}"
                )
            fill_up_ranks(trained)
        for name, content in trained.files.items():
            FileSystem().write_file(path / name, content)

    def measure(self, trained: TrainedAdapter, path: Path, rows: FidelityRows) -> Measured:
        """Load the adapter by stock mlx-lm's own function."""
        weights = read_with_stock(trained, path)
        return rows.measure(trained.with_weights(weights), weights)


def fill_up_ranks(trained: TrainedAdapter) -> None:
    """Give every layer of `trained` the largest rank and one scale: zeros fill A and B, and B carries its own."""
    assert trained.adapted is not None
    adapted, lora = trained.adapted, trained.lora
    targets, base = adapted.targets.adapted, adapted.base
    rank, scale = max(target.rank for target in targets), lora_scale(lora)
    trained.lora = replace(lora, rank=rank, rank_pattern=None, scale=scale, alpha=None, rslora=False)
    adapted.remove()
    trained.adapted = AdaptedModel(base, trained.lora, trained.config.seed)
    weights = padded(trained.weights, trained.adapted.params())
    for target in targets:
        if (own := lora_scale(lora, target.rank)) != scale:
            weights[f"{target.path}.lora_b"] = weights[f"{target.path}.lora_b"] * (own / scale)
    mx.eval(weights)
    trained.weights = weights
    config = json.loads(trained.files[ADAPTER_CONFIG])
    config["lora_parameters"]["rank"] = rank
    config.pop("rank_pattern", None)
    trained.files = {
        ADAPTERS: pack(to_tensors(weights), {"format": "mlx"}),
        ADAPTER_CONFIG: json.dumps(config, indent=1).encode(),
    }


def read_with_stock(trained: TrainedAdapter, folder: Path) -> Params:
    """Return the weights that stock mlx-lm puts into the layers of the base model when it loads the adapter `folder`.

    Raises:
        ModelError: it cannot load the adapter, or puts other layers into the model.
    """
    from mlx_lm.tuner.utils import load_adapters

    assert trained.adapted is not None
    base, seed = trained.adapted.base, trained.config.seed
    trained.adapted.remove()
    try:
        load_adapters(base.model, str(folder))
        stored = dict(tree_flatten(base.model.parameters()))
        weights = {name: array for name, array in stored.items() if name in trained.weights or name.endswith(_FACTORS)}
        mx.eval(weights)
    except MemoryError:
        raise
    except Exception as error:  # mlx-lm raises all kinds of errors
        raise ModelError(
            f"mlx-lm {version('mlx-lm')} cannot load this adapter (model_type '{base.config.get('model_type')}'): "
            f"{type(error).__name__}: {first_line(str(error))[:200]}. A model with it merged: --to fused."
        ) from error
    finally:
        trained.adapted.remove()  # what mlx-lm put there
        trained.adapted = AdaptedModel(base, trained.lora, seed)
    return warm_start(trained.weights, weights, str(folder))
