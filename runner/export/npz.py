"""One .npz file of the adapter's factors, as mlx-examples' lora.py saves and reads it.

lora.py adapts the query and value projections (and the gate of a mixture of experts) of the last `--lora-layers`
blocks, multiplies their update by a fixed factor, and ignores every other array of the file without a word. So another
factor is carried in B, and other layers are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import numpy as np

from runner.common.errors import ModelError
from runner.config.schema import LoraConfig
from runner.export.fidelity import EXACT_LIMIT, FidelityRows, Measured
from runner.export.target import Target
from runner.export.trained_adapter import TrainedAdapter, resolved_lora
from runner.models.lora import Params
from runner.models.warm_start import read_weights, warm_start

LORA_PY_SCALE = 20.0
"""The factor of lora.py's update."""
_ADAPTED_THERE = ("self_attn.q_proj", "self_attn.v_proj", "block_sparse_moe.gate")


class NpzTarget(Target):
    """`--to npz`."""

    limit = EXACT_LIMIT

    def write(self, trained: TrainedAdapter, path: Path) -> None:
        """Write the file. Raises ModelError: see `require_readable_there`."""
        require_readable_there(trained.weights, trained.lora)
        scale = _scale(trained.lora)
        factor = scale / LORA_PY_SCALE
        if factor != 1:
            trained.log(f"B is multiplied by {factor:.6g}: lora.py scales by {LORA_PY_SCALE:g}, this run by {scale:g}")
        arrays = {
            name: np.array(array.astype(mx.float32)) for name, array in _rescaled(trained.weights, factor).items()
        }
        np.savez(path, **arrays)  # type: ignore[arg-type]

    def measure(self, trained: TrainedAdapter, path: Path, rows: FidelityRows) -> Measured:
        """Read the file as `adapter=` does, with lora.py's factor."""
        weights = _rescaled(
            warm_start(trained.weights, read_weights(path), str(path)), LORA_PY_SCALE / _scale(trained.lora)
        )
        return rows.measure(trained.with_weights(weights), weights)


def require_readable_there(weights: Iterable[str], lora: LoraConfig) -> None:
    """Refuse an adapter that lora.py would read in part only, by the names of its weights; no model is needed.

    Raises:
        ModelError: it has other layers, or a scale of 0.
    """
    others = {key for name in weights if (key := _key(name)) not in _ADAPTED_THERE}
    if others:
        raise ModelError(
            "lora.py of mlx-examples adapts q_proj and v_proj alone, and would leave out "
            f"{', '.join(sorted(others))} of this adapter without a word. For mlx-lm: --to mlx. A run that it can "
            "read: lora=query_value."
        )
    if _scale(lora) == 0:
        raise ModelError("The adapter's scale is 0: it does nothing, and lora.py has no such scale.")


def _key(name: str) -> str:
    """Return the name of the adapted layer inside its block, of `model.layers.3.self_attn.q_proj.lora_a`."""
    return name.split(".layers.", 1)[-1].partition(".")[2].rpartition(".")[0]


def _scale(lora: LoraConfig) -> float:
    scale = resolved_lora(lora).scale
    assert scale is not None
    return scale


def _rescaled(weights: Params, factor: float) -> Params:
    return {name: array * factor if name.endswith("lora_b") else array for name, array in weights.items()}
