"""Runs with every kind of adapter: on a shared base, with recomputed activations, with cached hidden states."""

from __future__ import annotations

import json

import pytest

from runner.training.component_loader import ComponentLoader

SHORT = {"train.iters": 3, "train.eval_every": 3, "checkpoint.every": 3}
KINDS = {
    "dora": {"lora.type": "dora", "lora.num_layers": 2},
    "pissa": {"lora.init": "pissa", "lora.num_layers": 2},
    "full": {"lora.type": "full", "lora.num_layers": 1, "lora.modules_to_save": ["norm"]},
    "embedding": {"lora.keys": ["embed_tokens", "q_proj"], "lora.modules_to_save": ["norm"]},
}


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_jobs_of_a_sweep_give_the_base_back_as_it_was(tiny, train, tmp_path, assert_equal_runs):
    loader = ComponentLoader()
    for name, kind in KINDS.items():
        train(tiny(**SHORT, **kind), tmp_path / name, loader=loader)
    shared = train(tiny(**SHORT), tmp_path / "shared", loader=loader)
    assert_equal_runs(train(tiny(**SHORT), tmp_path / "alone"), shared)
    again = train(tiny(**SHORT, **KINDS["full"]), tmp_path / "again", loader=loader)
    assert_equal_runs(tmp_path / "full", again)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] if kind in ("pissa", "full") else []) for kind in KINDS]
)
def test_recomputed_activations_and_uncached_states_give_the_same_losses(tiny, train, tmp_path, kind):
    plain = losses(train(tiny(**SHORT, **KINDS[kind]), tmp_path / "plain"))
    assert plain[-1] < plain[0]
    for name, value in (("train.grad_checkpoint", True), ("train.hidden_cache.enabled", False)):
        other = losses(train(tiny(**SHORT, **KINDS[kind], **{name: value}), tmp_path / name))
        assert other == pytest.approx(plain, rel=1e-4)
