"""One vector for all arrays is what mlx's optimizers compute array by array, bit for bit."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from runner.common.errors import CheckpointError
from runner.models.arrays import to_tensors
from runner.training import optimizer as optimizers
from runner.training.optimizer import FlatLayout, NonFiniteArray, Optimizer, clip_grads

MADE = {
    "adam": lambda: optim.Adam(1e-3, bias_correction=True),
    "adamw": lambda: optim.AdamW(1e-3, weight_decay=0.1),
    "sgd": lambda: optim.SGD(1e-3, momentum=0.9, weight_decay=0.01),
}


def arrays(seed: int, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    numbers = np.random.default_rng(seed)
    shapes = {"a": (7, 5), "b": (3,), "model.c": (64, 33), "d": (1, 1)}
    out = {name: mx.array(numbers.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}
    return out | {"b": out["b"].astype(dtype), "e": (out["a"] * 2).astype(dtype)}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", list(MADE))
def test_updates_and_state_are_those_of_array_by_array(name: str, dtype: mx.Dtype) -> None:
    apart, together = MADE[name](), MADE[name]()
    params = arrays(0, dtype)
    apart.init(params)
    packed = Optimizer(together, params)
    theirs, ours = params, params
    for update in range(1, 6):
        grads, rate = arrays(update, dtype), 1e-2 / update
        apart.learning_rate = rate
        theirs = apart.apply_gradients(grads, theirs)
        ours = packed.update(ours, packed.layout.pack(grads), rate)
        assert list(ours) == list(params)
        assert all(mx.array_equal(ours[n], theirs[n]).item() and ours[n].dtype == theirs[n].dtype for n in params)
    state = dict(tree_flatten(apart.state))
    assert set(packed.state()) == set(state)
    assert all(mx.array_equal(packed.state()[n], state[n]).item() for n in state)


@pytest.mark.parametrize("name", list(MADE))
def test_several_vectors_are_the_same_as_one_and_take_its_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, grads = arrays(0), [arrays(update) for update in (1, 2)]
    one = Optimizer(MADE[name](), params)
    middle = one.update(params, one.layout.pack(grads[0]), 1e-3)
    state = {key: mx.array(np.array(array)) for key, array in one.state().items()}
    expected = one.update(middle, one.layout.pack(grads[1]), 1e-3)
    monkeypatch.setattr(optimizers, "_VECTOR_SIZE", 40)
    several = Optimizer(MADE[name](), params)
    assert list(several.layout.names) == ["float32", "float32.53"] and list(one.layout.names) == ["float32"]
    several.restore(state, "there")
    found = several.update(middle, several.layout.pack(grads[1]), 1e-3)
    assert list(found) == list(expected)
    assert all(mx.array_equal(found[n], expected[n]).item() for n in expected)
    for ours, theirs in zip(several.tensors(found), one.tensors(expected), strict=True):
        assert {n: bytes(t.data) for n, t in ours.items()} == {n: bytes(t.data) for n, t in theirs.items()}


def test_a_restored_state_goes_on_as_if_never_stopped_and_another_s_is_refused() -> None:
    params = arrays(0)
    first, second = (Optimizer(MADE["adam"](), params) for _ in range(2))
    grads = [first.layout.pack(arrays(update)) for update in (1, 2)]
    stopped = first.update(params, grads[0], 1e-3)
    state = {name: mx.array(np.array(array)) for name, array in first.state().items()}
    straight = first.update(stopped, grads[1], 1e-3)
    second.restore(state, "there")
    resumed = second.update(stopped, grads[1], 1e-3)
    assert all(mx.array_equal(resumed[n], straight[n]).item() for n in params)
    with pytest.raises(CheckpointError, match="there: .*different arrays"):
        second.restore({n: a for n, a in state.items() if n != "a.m"}, "there")
    with pytest.raises(CheckpointError, match=r"there: a\.m is"):
        second.restore({**state, "a.m": state["a.m"].T}, "there")


def test_the_norm_keeps_its_digits_over_millions_and_clips_as_mlx_does() -> None:
    numbers = np.random.default_rng(1).normal(size=3_000_001).astype(np.float32) * 1e-3
    grads = {"float32": mx.array(numbers)}
    exact = np.sqrt(np.square(numbers.astype(np.float64)).sum())
    same, norm = clip_grads(grads, None)
    assert same is grads and norm.item() == pytest.approx(exact, rel=1e-6)
    few = {"float32": grads["float32"][:5000]}
    ours, theirs = clip_grads(few, 0.02)[0]["float32"], optim.clip_grad_norm(few, 0.02)[0]["float32"]
    assert mx.allclose(ours, theirs, rtol=1e-5, atol=0).item()
    assert np.linalg.norm(np.array(ours)) == pytest.approx(0.02, rel=1e-4)
    assert mx.array_equal(clip_grads(grads, float(exact) * 2)[0]["float32"], grads["float32"]).item()


def test_arrays_of_a_vector_share_its_memory() -> None:
    params = arrays(3)
    layout = FlatLayout(params)
    vectors = layout.pack(params)
    parts = layout.unpack(vectors)
    mx.eval(vectors, parts)
    whole = np.array(vectors["float32"], copy=False)
    assert all(np.shares_memory(np.array(part, copy=False), whole) for part in parts.values())
    assert all(mx.array_equal(parts[n], params[n]).item() for n in params)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_what_a_checkpoint_gets_are_the_arrays_and_the_state_and_a_number_that_is_none_is_named(
    dtype: mx.Dtype,
) -> None:
    params = arrays(0, dtype)
    optimizer = Optimizer(MADE["adam"](), params)
    now = optimizer.update(params, optimizer.layout.pack(arrays(1, dtype)), 1e-3)
    for given in (now, dict(now), params):  # those of the last update, and any others
        found, state = optimizer.tensors(given)
        expected = to_tensors(given), to_tensors(optimizer.state())
        for ours, theirs in zip((found, state), expected, strict=True):
            assert set(ours) == set(theirs)
            for name, tensor in theirs.items():
                assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
                assert bytes(ours[name].data) == bytes(tensor.data)
    with pytest.raises(NonFiniteArray, match=r"^model\.c$"):
        optimizer.tensors({**now, "model.c": mx.full((64, 33), float("nan"))})
    optimizer.update(now, optimizer.layout.pack(arrays(2, dtype)), float("inf"))
    with pytest.raises(NonFiniteArray):
        optimizer.tensors(now)
