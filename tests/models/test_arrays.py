"""A snapshot of MLX arrays is their memory, not a copy, and what is computed later does not reach it."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest

from runner.checkpoints.safetensors_file import pack
from runner.models.arrays import parse_arrays, to_tensors


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.int32], ids=str)
def test_every_dtype_comes_back_as_it_was(dtype):
    arrays = {
        "matrix": (mx.random.normal((5, 7)) * 9).astype(dtype),
        "scalar": mx.array(3, dtype=dtype),
        "empty": mx.zeros((0, 4), dtype=dtype),
        "transposed": (mx.random.normal((5, 7)) * 9).astype(dtype).T,
        "sliced": (mx.random.normal((8, 8)) * 9).astype(dtype)[::2, 1:5],
    }
    back = parse_arrays(pack(to_tensors(arrays)), where="here")
    for name, array in arrays.items():
        assert back[name].dtype == dtype and back[name].shape == array.shape, name
        assert mx.array_equal(back[name], array), name


def test_a_snapshot_is_not_a_copy_and_stays_what_it_was_while_training_goes_on():
    params = {"a": mx.random.normal((256, 256)), "b": mx.random.normal((256, 256)).astype(mx.bfloat16)}
    mx.eval(params)
    before = {name: np.array(array.astype(mx.float32)) for name, array in params.items()}
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    snapshot = to_tensors(params)
    assert mx.get_peak_memory() - held < 1000
    params["a"] += 1.0  # in place
    params["b"] = params["b"] * 2
    mx.eval(params)
    del params
    gc.collect()
    for _ in range(20):  # freed memory is used again at once
        mx.eval(mx.ones((256, 256)) * 3, mx.ones((256, 256), dtype=mx.bfloat16) * 3)
    back = parse_arrays(pack(snapshot), where="here")
    for name, array in before.items():
        assert np.array_equal(np.array(back[name].astype(mx.float32)), array), name


def test_an_array_that_was_not_computed_yet_is_computed_here():
    lazy = mx.ones((4, 4)) + mx.ones((4, 4))
    assert to_tensors({"x": lazy})["x"].array().tolist() == [[2.0] * 4] * 4
