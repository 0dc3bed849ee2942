"""Weight averaging: the mean of the weights after each update is what is evaluated, saved and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from runner.common.errors import CheckpointError, ConfigError, NonFiniteUpdate
from runner.training.optimizer import FlatLayout
from runner.training.train_step import TrainStep
from runner.training.weight_average import WeightAverage

EACH_STEP = {"checkpoint.every": 1, "checkpoint.keep_last": 20, "train.averaging_power": 3.0}


def arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    return {key: np.array(array) for key, array in mx.load(str(folder / name)).items()}


def evaluations(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["split"] == "valid"}


@pytest.mark.parametrize(
    ("power", "weight"),
    [(0, lambda t: 1), (1, lambda t: t), (3, lambda t: t * (t + 1) * (t + 2))],
)
def test_the_mean_weighs_updates_by_a_power_of_their_number(power, weight):
    steps = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    params = [{"a": mx.array(step[:4].reshape(2, 2)), "b": mx.array(step[4:])} for step in steps]
    average = WeightAverage(power, FlatLayout(params[0]))
    assert average.params() is None and average.tensors() is None
    for number, each in enumerate(params, start=1):
        average.add(each, number)
    expected = np.average(steps.astype(np.float64), axis=0, weights=[weight(t) for t in range(1, 41)])
    found = average.params()
    assert found is not None
    np.testing.assert_allclose(np.array(found["a"]).reshape(-1), expected[:4], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(found["b"]), expected[4:], rtol=1e-5, atol=1e-6)


def test_a_mean_of_rounded_weights_is_kept_in_float32():
    """In 16 bits a step towards one more value in a thousand would be rounded away."""
    average = WeightAverage(0, FlatLayout({"a": mx.zeros(1, mx.bfloat16)}))
    for number in range(1, 1001):
        average.add({"a": mx.array([float(number > 500)], mx.bfloat16)}, number)
    assert float(average.vectors["bfloat16"][0]) == pytest.approx(0.5, abs=1e-3)


def test_checkpoints_and_the_result_are_the_mean_and_updates_are_as_without(tiny, train, tmp_path):
    plain = train(tiny(**EACH_STEP | {"train.averaging_power": None}), tmp_path / "plain")
    run = train(tiny(**EACH_STEP), tmp_path / "run")
    folders = [f"checkpoints/step-{step:07d}" for step in range(1, 13)]
    for folder in folders:
        assert not (plain / folder / "unaveraged.safetensors").exists()
        for name in ("unaveraged", "optimizer"):
            as_plain = (plain / folder / f"{name.replace('unaveraged', 'adapters')}.safetensors").read_bytes()
            assert (run / folder / f"{name}.safetensors").read_bytes() == as_plain
    weights = [arrays(plain / folder, "adapters.safetensors") for folder in folders]
    shares = [t * (t + 1) * (t + 2) for t in range(1, 13)]
    for name, array in arrays(run / folders[-1], "adapters.safetensors").items():
        mean = np.average([each[name].astype(np.float64) for each in weights], axis=0, weights=shares)
        np.testing.assert_allclose(array, mean, rtol=1e-4, atol=1e-6)
    best = min((step for step in evaluations(run) if step), key=evaluations(run).get)
    result = (run / f"checkpoints/step-{best:07d}/adapters.safetensors").read_bytes()
    assert (run / "adapters/adapters.safetensors").read_bytes() == result
    assert not (run / "adapters/unaveraged.safetensors").exists()


def test_the_loss_is_that_of_the_mean(tiny, train, tmp_path, inline):
    run = train(tiny(**EACH_STEP | {"train.iters": 6}), inline.folder / "run")
    plain = train(tiny(**EACH_STEP | {"train.iters": 6, "train.averaging_power": None}), inline.folder / "plain")
    assert evaluations(run)[6] != evaluations(plain)[6]
    for folder in (run, plain):
        told = inline("test", folder.name, "--split", "valid", "--json")
        assert json.loads(told)["loss"] == pytest.approx(evaluations(folder)[6], rel=1e-6)


@pytest.mark.parametrize("kind", [{"lora.type": "dora"}, {"lora.init": "pissa"}, {"optimizer.name": "muon"}], ids=str)
def test_every_kind_of_adapter_has_a_mean_and_resumes_exactly(tiny, train, tmp_path, assert_equal_runs, kind):
    config = tiny(
        **{"train.iters": 6, "train.eval_every": 2, "checkpoint.every": 2, "train.averaging_power": 1}, **kind
    )
    whole = train(config, tmp_path / "whole")
    assert (whole / "checkpoints/step-0000006/unaveraged.safetensors").exists()
    run = train(config, tmp_path / "run", stop_at=3)
    train(config, run, resume=run)
    assert_equal_runs(whole, run)


def test_a_resume_cannot_switch_it_and_a_checkpoint_without_its_weights_is_refused(tiny, train, tmp_path):
    run = train(tiny(**EACH_STEP), tmp_path / "run", stop_at=3)
    with pytest.raises(ConfigError, match=r"train\.averaging_power"):
        train(tiny(**EACH_STEP | {"train.averaging_power": None}), run, resume=run)
    for folder in (run / "checkpoints").iterdir():
        (folder / "unaveraged.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"unaveraged\.safetensors"):
        train(tiny(**EACH_STEP), run, resume=run)


@pytest.fixture
def failing_at(monkeypatch):
    """Updates with the numbers in this set are not finite, and skipped."""
    own, numbers = TrainStep.update, set()

    def update(self, state, batches, learning_rate):
        if state.progress.step + 1 in numbers:
            raise NonFiniteUpdate(f"The loss at update {state.progress.step + 1} is not finite.")
        return own(self, state, batches, learning_rate)

    monkeypatch.setattr(TrainStep, "update", update)
    return numbers


@pytest.mark.parametrize("skipped", [{3, 5}, {1, 2}], ids=str)
def test_skipped_updates_do_not_count_and_resumes_among_them_are_exact(
    tiny, train, tmp_path, assert_equal_runs, failing_at, skipped
):
    failing_at |= skipped
    settings = {**EACH_STEP, "train.iters": 6, "train.on_nonfinite": "skip"}
    run = train(tiny(**settings), tmp_path / "run")
    applied = [step for step in range(1, 7) if step not in skipped]
    weights = [arrays(run / f"checkpoints/step-{step:07d}", "unaveraged.safetensors") for step in applied]
    shares = [t * (t + 1) * (t + 2) for t in range(1, len(applied) + 1)]
    for name, array in arrays(run / "checkpoints/step-0000006", "adapters.safetensors").items():
        mean = np.average([each[name].astype(np.float64) for each in weights], axis=0, weights=shares)
        np.testing.assert_allclose(array, mean, rtol=1e-4, atol=1e-6)
    stopped = train(tiny(**settings), tmp_path / "stopped", stop_at=2)
    train(tiny(**settings), stopped, resume=stopped)
    assert_equal_runs(run, stopped)
