"""Convert between MLX arrays and the tensors of a safetensors file, strictly checked."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from runner.checkpoints.safetensors_file import Tensor, require_finite, unpack
from runner.common.errors import CheckpointError

_MAX_ARRAYS = 20_000


def to_tensors(arrays: Mapping[str, mx.array]) -> dict[str, Tensor]:
    """Return tensors that are views of the arrays' memory, evaluated and without a copy.

    The views keep the memory alive and unchanged, so another thread may read them while training continues: MLX
    computes into new arrays and reuses an old one's memory only when nothing else refers to it.
    """
    # numpy has no bfloat16, so its bits are viewed as uint16. The view also makes an array of our own: an in-place
    # operation on the caller's (a += b) then moves the caller's array to new memory, not ours.
    views = {}
    for name, array in arrays.items():
        views[name] = array.view(mx.uint16 if array.dtype == mx.bfloat16 else array.dtype)
    mx.eval(list(views.values()))
    return {
        name: Tensor.of(np.asarray(view), "BF16" if arrays[name].dtype == mx.bfloat16 else None)
        for name, view in views.items()
    }


def parse_arrays(data: bytes, source: str) -> dict[str, mx.array]:
    """Return the arrays of a safetensors file with the bytes `data`; `source` names it in errors.

    Raises:
        CheckpointError: the file is malformed, has too many arrays or contains NaN or Inf.
    """
    tensors = unpack(data, where=source)[0]
    if len(tensors) > _MAX_ARRAYS:
        raise CheckpointError(f"{source}: {len(tensors):,} arrays, more than the {_MAX_ARRAYS:,} that are accepted.")
    require_finite(tensors, where=source)
    arrays = {}
    for name, tensor in tensors.items():
        array = mx.array(tensor.array())
        arrays[name] = array.view(mx.bfloat16) if tensor.dtype == "BF16" else array
    mx.eval(list(arrays.values()))
    return arrays
