"""MLX arrays as the tensors of a safetensors file, and back; strictly checked."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from runner.checkpoints.safetensors_file import Tensor, unpack
from runner.common.errors import CheckpointError
from runner.common.text import shorten

_MOST_ARRAYS = 20_000
_BITS = {mx.bfloat16: ("BF16", mx.uint16)}


def to_tensors(arrays: Mapping[str, mx.array]) -> dict[str, Tensor]:
    """MLX arrays as views of their own memory, through numpy; bfloat16, which numpy lacks, through its bits.

    The views keep the memory alive and as it is: MLX computes into new arrays, and reuses the memory of an old one
    only where nothing else holds it. So another thread may read them while training goes on.
    """
    # `view` makes arrays of our own: an operation in place (a += b) gives the caller's another memory, not ours.
    bits = {name: _BITS.get(array.dtype, (None, array.dtype)) for name, array in arrays.items()}
    own = {name: array.view(bits[name][1]) for name, array in arrays.items()}
    mx.eval(list(own.values()))
    return {name: Tensor.of(np.asarray(array), bits[name][0]) for name, array in own.items()}


def parse_arrays(data: bytes, where: str) -> dict[str, mx.array]:
    """MLX arrays from the bytes of a safetensors file, strictly checked, every value finite.

    Raises:
        CheckpointError: names `where` and the reason.
    """
    out = {}
    tensors = unpack(data, where=where)[0]
    if len(tensors) > _MOST_ARRAYS:
        raise CheckpointError(f"{where}: {len(tensors):,} arrays, more than the {_MOST_ARRAYS:,} of any adapter.")
    for name, tensor in tensors.items():
        if not tensor.is_finite():
            raise CheckpointError(f"{where}: {shorten(name)} holds values that are not finite.")
        array = mx.array(tensor.array())
        out[name] = array.view(mx.bfloat16) if tensor.dtype == "BF16" else array
    mx.eval(list(out.values()))
    return out
