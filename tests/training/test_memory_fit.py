"""What makes a run fit: the warning before it starts, and the proposal of --fit."""

from __future__ import annotations

import json

import pytest

from runner.training import memory_fit
from runner.training.memory_estimate import estimate_memory, needed, plan_model
from runner.training.run_plan import load_planned_data


@pytest.fixture
def limited(monkeypatch):
    """`limited(bytes)`: a machine with so little memory, which cannot be had here."""

    def limit(size):
        monkeypatch.setattr(memory_fit, "device_limit", lambda: (size, "available memory"))

    return limit


@pytest.fixture
def planned(tiny):
    """`planned(**settings)`: a config on MLX's path, its data, its model and what it needs."""

    def make(**changes):
        config = tiny(**{"train.cpu_engine": False, "train.batch_size": 16, "train.eval_tokens": 1, **changes})
        model = plan_model(config)
        data = load_planned_data(config, model)[0]
        return config, data, model, needed(estimate_memory(config, data, model))

    return make


def test_a_run_that_fits_gets_no_warning_and_no_estimate_is_made_where_it_surely_does(planned, monkeypatch):
    config, data, model, _ = planned()
    monkeypatch.setattr(memory_fit, "estimate_memory", lambda *_: pytest.fail("estimated"))
    assert memory_fit.memory_warning(config, data, model) is None


def test_the_warning_names_the_setting_that_helps_most_with_what_it_brings(planned, limited):
    config, data, model, need = planned()
    limited(need - 1)
    warning = memory_fit.memory_warning(config, data, model)
    best = memory_fit.options_that_help(config, data)[0]
    assert best.needed < need
    assert f"{best.text()} brings it to {best.needed / 1e9:.1f} GB" in warning
    limited(need)
    assert memory_fit.memory_warning(config, data, model) is None


def test_a_run_warns_and_goes_on(tiny, train, tmp_path, limited):
    limited(1)
    run = train(tiny(**{"train.iters": 1}), tmp_path / "run")
    assert "GB are needed at the peak, by estimate" in (run / "run.log").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_fit_proposes_the_most_rows_at_once_without_checkpointing(planned, limited):
    config, data, _, need = planned()
    limited(need)
    assert memory_fit.fit(config, data).overrides == {}
    limited(need - 1)
    found = memory_fit.fit(config, data)
    assert found.overrides == {"train.rows_at_once": 8} and found.needed < need
    config.train.grad_checkpoint = True
    limited(need)
    assert memory_fit.fit(config, data).overrides == {"train.grad_checkpoint": False}
    limited(1)
    assert memory_fit.fit(config, data) is None


@pytest.mark.parametrize("engine", [True, False])
def test_with_fewer_rows_at_once_an_update_is_the_same_but_for_rounding(tiny, train, rows, tmp_path, engine):
    settings = {"train.cpu_engine": engine, "train.batch_size": 4, "train.grad_accumulation": 2, "train.iters": 6}
    whole = rows(train(tiny(**settings), tmp_path / "whole"))
    parts = rows(train(tiny(**settings, **{"train.rows_at_once": 3}), tmp_path / "parts"))
    assert len(whole) == len(parts)
    for a, b in zip(whole, parts, strict=True):
        assert {k: v for k, v in a.items() if not isinstance(v, float)} == {
            k: v for k, v in b.items() if not isinstance(v, float)
        }
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
