"""Tensors made from MLX arrays share their memory, and later computations do not change them."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest

from runner.checkpoints.safetensors_file import pack
from runner.models.arrays import parse_arrays, to_tensors


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.int32], ids=str)
def test_every_dtype_survives_a_round_trip(dtype):
    arrays = {
        "matrix": (mx.random.normal((5, 7)) * 9).astype(dtype),
        "scalar": mx.array(3, dtype=dtype),
        "empty": mx.zeros((0, 4), dtype=dtype),
        "transposed": (mx.random.normal((5, 7)) * 9).astype(dtype).T,
        "sliced": (mx.random.normal((8, 8)) * 9).astype(dtype)[::2, 1:5],
    }
    restored = parse_arrays(pack(to_tensors(arrays)), source="test")
    for name, array in arrays.items():
        assert restored[name].dtype == dtype and restored[name].shape == array.shape, name
        assert mx.array_equal(restored[name], array), name


def test_tensors_share_the_arrays_memory_and_do_not_change_while_training_continues():
    params = {"a": mx.random.normal((256, 256)), "b": mx.random.normal((256, 256)).astype(mx.bfloat16)}
    mx.eval(params)
    before = {name: np.array(array.astype(mx.float32)) for name, array in params.items()}
    mx.reset_peak_memory()
    active = mx.get_active_memory()
    snapshot = to_tensors(params)
    assert mx.get_peak_memory() - active < 1000
    params["a"] += 1.0  # in place
    params["b"] = params["b"] * 2
    mx.eval(params)
    del params
    gc.collect()
    for _ in range(20):  # freed memory is reused at once
        mx.eval(mx.ones((256, 256)) * 3, mx.ones((256, 256), dtype=mx.bfloat16) * 3)
    restored = parse_arrays(pack(snapshot), source="test")
    for name, array in before.items():
        assert np.array_equal(np.array(restored[name].astype(mx.float32)), array), name


def test_a_lazy_array_is_evaluated():
    lazy = mx.ones((4, 4)) + mx.ones((4, 4))
    assert to_tensors({"x": lazy})["x"].array().tolist() == [[2.0] * 4] * 4
