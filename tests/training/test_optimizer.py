"""Updates of flat vectors are bitwise equal to MLX's updates array by array."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from runner.common.errors import CheckpointError
from runner.config.schema import LoraConfig
from runner.models.arrays import to_tensors
from runner.training import optimizer as optimizers
from runner.training.optimizer import FlatLayout, NonFiniteArray, Optimizer, clip_grads

OPTIMIZERS = {
    "adam": lambda: optim.Adam(1e-3, bias_correction=True),
    "adamw": lambda: optim.AdamW(1e-3, weight_decay=0.1),
    "sgd": lambda: optim.SGD(1e-3, momentum=0.9, weight_decay=0.01),
}


def arrays(seed: int, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    generator = np.random.default_rng(seed)
    shapes = {"a": (7, 5), "b": (3,), "model.c": (64, 33), "d": (1, 1)}
    out = {name: mx.array(generator.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}
    return out | {"b": out["b"].astype(dtype), "e": (out["a"] * 2).astype(dtype)}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_updates_and_state_equal_those_array_by_array(name: str, dtype: mx.Dtype) -> None:
    reference, flat = OPTIMIZERS[name](), OPTIMIZERS[name]()
    params = arrays(0, dtype)
    reference.init(params)
    optimizer = Optimizer(flat, params)
    expected, updated = params, params
    for update in range(1, 6):
        grads, rate = arrays(update, dtype), 1e-2 / update
        reference.learning_rate = rate
        expected = reference.apply_gradients(grads, expected)
        updated = optimizer.update(updated, optimizer.layout.flatten(grads), rate)
        assert list(updated) == list(params)
        for n in params:
            assert mx.array_equal(updated[n], expected[n]).item() and updated[n].dtype == expected[n].dtype
    state = dict(tree_flatten(reference.state))
    assert set(optimizer.state()) == set(state)
    assert all(mx.array_equal(optimizer.state()[n], state[n]).item() for n in state)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_several_vectors_equal_one_and_can_load_its_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, grads = arrays(0), [arrays(update) for update in (1, 2)]
    one = Optimizer(OPTIMIZERS[name](), params)
    middle = one.update(params, one.layout.flatten(grads[0]), 1e-3)
    state = {key: mx.array(np.array(array)) for key, array in one.state().items()}
    expected = one.update(middle, one.layout.flatten(grads[1]), 1e-3)
    monkeypatch.setattr(optimizers, "_VECTOR_SIZE", 40)
    several = Optimizer(OPTIMIZERS[name](), params)
    assert list(several.layout.names) == ["float32", "float32.53"] and list(one.layout.names) == ["float32"]
    several.restore(state, "source")
    result = several.update(middle, several.layout.flatten(grads[1]), 1e-3)
    assert list(result) == list(expected)
    assert all(mx.array_equal(result[n], expected[n]).item() for n in expected)
    for ours, theirs in zip(several.tensors(result), one.tensors(expected), strict=True):
        assert {n: bytes(t.data) for n, t in ours.items()} == {n: bytes(t.data) for n, t in theirs.items()}


def test_a_restored_state_continues_exactly_and_a_different_one_is_refused() -> None:
    params = arrays(0)
    uninterrupted, restored = (Optimizer(OPTIMIZERS["adam"](), params) for _ in range(2))
    grads = [uninterrupted.layout.flatten(arrays(update)) for update in (1, 2)]
    stopped = uninterrupted.update(params, grads[0], 1e-3)
    state = {name: mx.array(np.array(array)) for name, array in uninterrupted.state().items()}
    expected = uninterrupted.update(stopped, grads[1], 1e-3)
    restored.restore(state, "source")
    resumed = restored.update(stopped, grads[1], 1e-3)
    assert all(mx.array_equal(resumed[n], expected[n]).item() for n in params)
    with pytest.raises(CheckpointError, match="source: .*different arrays"):
        restored.restore({n: a for n, a in state.items() if n != "a.m"}, "source")
    with pytest.raises(CheckpointError, match=r"source: a\.m is"):
        restored.restore({**state, "a.m": state["a.m"].T}, "source")


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_lora_plus_moves_b_at_its_own_rate_and_everything_else_as_before(name: str) -> None:
    params = {f"x.{part}": array for part, array in zip(("lora_a", "lora_b", "m"), arrays(0).values(), strict=False)}
    ratios = optimizers.lr_ratios(LoraConfig(b_lr_ratio=16.0), params)
    assert ratios == {"x.lora_b": 16.0} and optimizers.lr_ratios(LoraConfig(), params) == {}
    plus = Optimizer(OPTIMIZERS[name](), params, ratios)
    alone = {n: Optimizer(OPTIMIZERS[name](), {n: array}) for n, array in params.items()}
    expected, updated = dict(params), params
    for update in range(1, 4):
        grads = {n: array * update for n, array in params.items()}
        updated = plus.update(updated, plus.layout.flatten(grads), 1e-3)
        for n, one in alone.items():
            rate = 1e-3 * ratios.get(n, 1.0)
            expected[n] = one.update({n: expected[n]}, one.layout.flatten({n: grads[n]}), rate)[n]
    assert all(mx.array_equal(updated[n], expected[n]).item() for n in params)
    assert float(plus.state()["learning_rate"]) == pytest.approx(1e-3) and int(plus.state()["step"]) == 3
    resumed = Optimizer(OPTIMIZERS[name](), params, ratios)
    resumed.restore(plus.state(), "source")
    grads = plus.layout.flatten(params)
    both = [one.update(updated, grads, 1e-3) for one in (plus, resumed)]
    assert all(mx.array_equal(both[0][n], both[1][n]).item() for n in params)


def test_the_norm_is_exact_over_millions_of_elements_and_clips_as_mlx_does() -> None:
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


def test_unflattened_arrays_share_the_memory_of_their_vector() -> None:
    params = arrays(3)
    layout = FlatLayout(params)
    vectors = layout.flatten(params)
    parts = layout.unflatten(vectors)
    mx.eval(vectors, parts)
    whole = np.array(vectors["float32"], copy=False)
    assert all(np.shares_memory(np.array(part, copy=False), whole) for part in parts.values())
    assert all(mx.array_equal(parts[n], params[n]).item() for n in params)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_tensors_for_a_checkpoint_equal_arrays_and_state_and_nan_is_reported_by_name(
    dtype: mx.Dtype,
) -> None:
    params = arrays(0, dtype)
    optimizer = Optimizer(OPTIMIZERS["adam"](), params)
    updated = optimizer.update(params, optimizer.layout.flatten(arrays(1, dtype)), 1e-3)
    for params_to_save in (updated, dict(updated), params):  # the result of the last update, and other arrays
        tensors, state = optimizer.tensors(params_to_save)
        expected = to_tensors(params_to_save), to_tensors(optimizer.state())
        for ours, theirs in zip((tensors, state), expected, strict=True):
            assert set(ours) == set(theirs)
            for name, tensor in theirs.items():
                assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
                assert bytes(ours[name].data) == bytes(tensor.data)
    with pytest.raises(NonFiniteArray, match=r"^model\.c$"):
        optimizer.tensors({**updated, "model.c": mx.full((64, 33), float("nan"))})
    optimizer.update(updated, optimizer.layout.flatten(arrays(2, dtype)), float("inf"))
    with pytest.raises(NonFiniteArray):
        optimizer.tensors(updated)
