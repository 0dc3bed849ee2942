"""Updates are bitwise equal to MLX's updates array by array, and follow the formulas of the papers."""

from __future__ import annotations

import re
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from runner.common.errors import CheckpointError
from runner.config import schema, validation
from runner.config.schema import LoraConfig
from runner.models.arrays import to_tensors
from runner.training import optimizer as optimizers
from runner.training.optimizer import (
    FlatLayout,
    Muon,
    NonFiniteArray,
    Optimizer,
    build_optimizer,
    clip_grads,
    state_bytes,
)

OPTIMIZERS = {
    "adam": lambda: optim.Adam(1e-3, bias_correction=True),
    "adamw": lambda: optim.AdamW(1e-3, weight_decay=0.1),
    "sgd": lambda: optim.SGD(1e-3, momentum=0.9, weight_decay=0.01),
    "lion": lambda: optim.Lion(1e-3, weight_decay=0.1),
    "adafactor": lambda: optim.Adafactor(1e-3, beta_1=0.9, weight_decay=0.1, relative_step=False),
    "muon": lambda: optim.Muon(1e-3),
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


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_restored_state_continues_exactly_and_a_different_one_is_refused(name: str) -> None:
    params = arrays(0)
    uninterrupted, restored = (Optimizer(OPTIMIZERS[name](), params) for _ in range(2))
    grads = [uninterrupted.layout.flatten(arrays(update)) for update in (1, 2)]
    stopped = uninterrupted.update(params, grads[0], 1e-3)
    state = {name: mx.array(np.array(array)) for name, array in uninterrupted.state().items()}
    expected = uninterrupted.update(stopped, grads[1], 1e-3)
    restored.restore(state, "source")
    resumed = restored.update(stopped, grads[1], 1e-3)
    assert all(mx.array_equal(resumed[n], expected[n]).item() for n in params)
    part = next(n for n in state if n.startswith("a."))
    with pytest.raises(CheckpointError, match="source: .*different arrays"):
        restored.restore({n: a for n, a in state.items() if n != part}, "source")
    with pytest.raises(CheckpointError, match=f"source: {re.escape(part)} is"):
        restored.restore({**state, part: state[part][None]}, "source")


def test_every_optimizer_of_the_schema_is_compared_here() -> None:
    assert list(optimizers.CLASSES) == list(schema.metadata()["optimizer.name"].choices)
    assert set(OPTIMIZERS) == set(optimizers.CLASSES)


def test_muon_makes_each_matrix_of_a_stack_orthogonal_and_not_the_stack() -> None:
    generator = np.random.default_rng(3)
    stacks = [mx.array(generator.normal(size=(3, 8, 5)).astype(np.float32)) for _ in range(3)]
    optimizer = Optimizer(Muon(0.0), {"stack": stacks[0]})
    singles = [Optimizer(optim.Muon(0.0), {"matrix": matrix}) for matrix in stacks[0]]
    updated, expected = stacks[0], list(stacks[0])
    for grads in stacks[1:]:
        updated = optimizer.update({"stack": updated}, optimizer.layout.flatten({"stack": grads}), 0.1)["stack"]
        for i, single in enumerate(singles):
            flat = single.layout.flatten({"matrix": grads[i]})
            expected[i] = single.update({"matrix": expected[i]}, flat, 0.1)["matrix"]
    assert mx.array_equal(updated, mx.stack(expected)).item()
    assert mx.array_equal(optimizer.state()["stack.v"], mx.stack([s.state()["matrix.v"] for s in singles])).item()


Update = Callable[[np.ndarray, np.ndarray, dict, int], np.ndarray]


def lion_of_the_paper(w: np.ndarray, g: np.ndarray, state: dict, update: int) -> np.ndarray:
    """Algorithm 2 of arXiv:2302.06675."""
    m = state.get("m", 0.0)
    state["m"] = 0.99 * m + 0.01 * g
    return w - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * w)


def adafactor_of_transformers(w: np.ndarray, g: np.ndarray, state: dict, update: int) -> np.ndarray:
    """`Adafactor.step` of transformers with relative_step=False and scale_parameter=True."""
    rms = np.sqrt(np.mean(w * w))
    beta2, squares = 1 - update**-0.8, g * g + 1e-30
    if w.ndim == 1:
        state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * squares
        direction = g / np.sqrt(state["v"])
    else:
        state["row"] = beta2 * state.get("row", 0.0) + (1 - beta2) * squares.mean(axis=-1)
        state["col"] = beta2 * state.get("col", 0.0) + (1 - beta2) * squares.mean(axis=-2)
        row = 1 / np.sqrt(state["row"] / state["row"].mean(axis=-1, keepdims=True))
        direction = row[:, None] / np.sqrt(state["col"]) * g
    rate = 0.01 * max(1e-3, rms)
    step = rate * direction / max(1.0, np.sqrt(np.mean(direction**2)))
    return w - 0.1 * rate * w - step


def muon_of_jordan(w: np.ndarray, g: np.ndarray, state: dict, update: int) -> np.ndarray:
    """`SingleDeviceMuon` of github.com/KellerJordan/Muon: momentum, Nesterov, five iterations, scaled by the shape."""
    state["m"] = state.get("m", 0.0) * 0.95 + 0.05 * g
    u = 0.05 * g + 0.95 * state["m"]
    if w.ndim == 1:  # as in MLX's class
        return w - 0.01 * u
    x = u.T if w.shape[0] > w.shape[1] else u
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if w.shape[0] > w.shape[1] else x
    return w - 0.01 * max(1, w.shape[0] / w.shape[1]) ** 0.5 * x


@pytest.mark.parametrize(
    ("name", "options", "formula"),
    [
        ("lion", {"weight_decay": 0.1}, lion_of_the_paper),
        ("adafactor", {"weight_decay": 0.1, "scale_parameter": True}, adafactor_of_transformers),
        ("muon", {}, muon_of_jordan),
    ],
)
def test_updates_follow_the_formula_of_the_paper_in_double_precision(
    name: str, options: dict, formula: Update, tiny
) -> None:
    changes = {f"optimizer.{option}": value for option, value in options.items()}
    config = tiny(**{"optimizer.name": name, "optimizer.learning_rate": 0.01, **changes})
    params = {n: a for n, a in arrays(0).items() if n != "d"}
    optimizer = build_optimizer(config, params)
    expected = {n: np.array(a, dtype=np.float64) for n, a in params.items()}
    states: dict[str, dict] = {n: {} for n in params}
    for update in range(1, 6):
        grads = arrays(update)
        params = optimizer.update(params, optimizer.layout.flatten(grads), 0.01)
        expected = {n: formula(w, np.array(grads[n], dtype=np.float64), states[n], update) for n, w in expected.items()}
    for n, array in params.items():
        assert np.abs(np.array(array) - expected[n]).max() < 2e-5, n


@pytest.mark.parametrize(("name", "bytes_of_1000_by_8"), [("adamw", 64_000), ("lion", 32_000), ("adafactor", 4_032)])
def test_the_size_of_the_state_is_that_of_its_arrays(name: str, bytes_of_1000_by_8: int) -> None:
    config = validation.fill_defaults(schema.Config(optimizer=schema.OptimizerConfig(name=name)))
    params = {"a": mx.zeros((1000, 8))}
    state = build_optimizer(config, params).state()
    assert sum(a.nbytes for n, a in state.items() if n.startswith("a.")) == bytes_of_1000_by_8
    assert state_bytes(config.optimizer, params) == bytes_of_1000_by_8


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


@pytest.mark.parametrize("name", ["adam", "adafactor"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_tensors_for_a_checkpoint_equal_arrays_and_state_and_nan_is_reported_by_name(
    dtype: mx.Dtype, name: str
) -> None:
    params = arrays(0, dtype)
    optimizer = Optimizer(OPTIMIZERS[name](), params)
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
