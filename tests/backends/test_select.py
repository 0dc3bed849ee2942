"""Probes of the model's parts and the engine: cached under everything that they depend on, and never without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runner.backends import select
from runner.backends.cpu import probe
from runner.models import split_probe
from runner.models.device import on_cpu

pytestmark = pytest.mark.usefixtures("cache")
PROBES = {"parts", "engine"} if on_cpu() else {"parts"}
SHORT = {"train.iters": 1, "checkpoint.every": None}


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the probes that ran since the list was last cleared."""
    seen: list[str] = []

    def watched(name: str, own: Callable) -> Callable:
        def call(*arguments: object) -> object:
            seen.append(name)
            return own(*arguments)

        return call

    monkeypatch.setattr(probe, "agrees", watched("engine", probe.agrees))
    monkeypatch.setattr(split_probe, "find_parts", watched("parts", split_probe.find_parts))
    return seen


def test_equal_models_and_settings_are_probed_once(tiny, train, tmp_path, cache, probed):
    first = train(tiny(**SHORT), tmp_path / "first")
    assert set(probed) == PROBES
    probed.clear()
    second = train(tiny(**SHORT, **{"seed": 3, "optimizer.learning_rate": 1e-4}), tmp_path / "second")
    assert not probed
    assert "engine not used" not in (first / "run.log").read_text() + (second / "run.log").read_text()


@pytest.mark.parametrize(
    "other",
    [
        {"lora.rank": 4},
        {"lora.num_layers": 2},
        {"lora.keys": ["self_attn.q_proj"]},
        {"train.grad_checkpoint": True},
        {"train.loss_chunk": 8},
        {"train.cache_probes": False},
    ],
    ids=str,
)
def test_other_models_and_settings_are_probed_again(tiny, train, tmp_path, probed, other):
    train(tiny(**SHORT), tmp_path / "first")
    probed.clear()
    train(tiny(**SHORT, **other), tmp_path / "second")
    assert set(probed) == PROBES


def test_changed_code_is_probed_again(tiny, train, tmp_path, probed, monkeypatch):
    train(tiny(**SHORT), tmp_path / "first")
    probed.clear()
    monkeypatch.setattr(select, "code_digest", lambda: "other")
    train(tiny(**SHORT), tmp_path / "second")
    assert set(probed) == PROBES


@pytest.mark.parametrize("harm", [lambda file: file.write_text("{}"), lambda file: file.unlink()], ids=["cut", "gone"])
def test_a_damaged_cache_entry_is_probed_again(tiny, train, tmp_path, cache, probed, harm):
    train(tiny(**SHORT), tmp_path / "first")
    (file,) = (cache / "checks").iterdir()
    before = file.read_bytes()
    harm(file)
    probed.clear()
    train(tiny(**SHORT), tmp_path / "second")
    assert set(probed) == PROBES and file.read_bytes() == before


@pytest.mark.cpu("the probe of the CPU engine")
def test_a_failed_probe_is_not_cached(tiny, train, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(probe, "agrees", lambda engine, adapted, forward: False)
    run = train(tiny(**SHORT), tmp_path / "run")
    reason = "using MLX instead of the CPU engine: its gradients differ from MLX's for this model"
    assert reason in (run / "run.log").read_text()
    monkeypatch.undo()
    again = train(tiny(**SHORT), tmp_path / "again")
    assert reason not in (again / "run.log").read_text()


def test_with_cache_probes_off_nothing_is_cached(tiny, train, tmp_path, cache):
    train(tiny(**SHORT, **{"train.cache_probes": False}), tmp_path / "run")
    assert not (cache / "checks").exists()
