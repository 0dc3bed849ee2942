"""Two hashes of a base model: a fingerprint of its weights and a hash of everything that determines its output.

The fingerprint is stored in checkpoints and adapter configs and compared on every resume, so it depends on the weights
alone and not on where they were loaded from. Caches of computed values need more: they must also miss after a change
of a single weight, of the config or of the model's code. That is the content hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

_SAMPLE_SIZE = 1024


def weights_fingerprint(model: nn.Module, carried_over: Mapping[str, Any]) -> str:
    """Return the SHA-256 over every parameter's name, shape, dtype and up to 1,024 evenly spaced elements.

    `carried_over` is hashed, too, if there is any: earlier versions loaded another model from the same weights.

    Sampling identifies a model of 8B parameters in well under a second. Another fine-tune of the same architecture
    differs in nearly all elements, hence in the sample.
    """
    samples = {}
    for name, array in sorted(tree_flatten(model.parameters())):
        flat = array.reshape(-1)
        sample = flat[:: max(1, flat.size // _SAMPLE_SIZE)][:_SAMPLE_SIZE]
        if mx.issubdtype(sample.dtype, mx.floating):
            sample = sample.astype(mx.float32)
        samples[_label(name, array)] = sample
    return _digest(samples, prefix=json.dumps(carried_over, sort_keys=True, default=str) if carried_over else "")


def content_hash(model: nn.Module, config: Mapping[str, Any], fingerprint: str, code_sha256: str = "") -> str:
    """Return the SHA-256 over `config`, `fingerprint`, the hash of the model's own code and a checksum of every row.

    Unlike the sampled fingerprint, the checksums change with any single weight and when rows are swapped; unlike a
    hash of all bytes, they are computed at memory bandwidth. A row's checksum is the sum of its bytes read as 64-bit
    integers: in 32 bits, doubling a row of 512 float32 weights, which adds 2^23 to each, would not change the sum.
    """
    checksums = {}
    for name, array in sorted(tree_flatten(model.parameters())):
        rows = array.reshape(-1, array.shape[-1] if array.ndim else 1)
        divisible = rows.shape[-1] * rows.dtype.size % 8 == 0
        integers = rows.view(mx.uint64) if divisible else rows.view(mx.uint8).astype(mx.uint64)
        checksums[_label(name, array)] = integers.sum(axis=-1)
    description = [fingerprint, config, *([code_sha256] if code_sha256 else [])]
    return _digest(checksums, prefix=json.dumps(description, sort_keys=True, default=str))


def _label(name: str, array: mx.array) -> str:
    return f"{name} {array.shape} {array.dtype}"


def _digest(arrays: Mapping[str, mx.array], prefix: str = "") -> str:
    """Return the SHA-256 of `prefix` and of each label with its array's bytes."""
    mx.eval(list(arrays.values()))
    digest = hashlib.sha256(prefix.encode())
    for label, array in arrays.items():
        digest.update(label.encode())
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()
