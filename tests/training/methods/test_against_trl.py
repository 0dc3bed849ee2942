"""The loss and the gradient of one update, for each method that TRL has too, against TRL's own trainers.

`reference/trl.json` holds the token ids and some of what TRL computed; every test run compares with that, and those
marked `reference` run TRL and compare everything.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from trl_updates import OURS, RUNS, TOLERANCE, compare, our_names, our_update, recorded, run_trl, summary, their_summary

from runner.models.device import on_cpu

BACKENDS = ["mlx", pytest.param("cpu", marks=pytest.mark.cpu("the engine computes on the CPU only"))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OURS)
def test_loss_and_gradient_are_those_recorded_from_trl(name: str, backend: str, cache: Path) -> None:
    run, theirs = RUNS[name], recorded()["runs"][name]
    for micro_batches in (1, 2):
        ours = summary(*our_update(run.method, recorded()["batches"][run.batch], backend, micro_batches))
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE)
        for part in ("norms", "entries"):
            assert ours[part] == pytest.approx(theirs[part], rel=TOLERANCE, abs=TOLERANCE * theirs["largest"]), part
        for measure, value in theirs["measures"].items():
            assert ours["measures"][measure] == pytest.approx(value, abs=TOLERANCE), measure


def test_the_recorded_batches_are_such_as_the_methods_tell_apart() -> None:
    runs = recorded()["runs"]
    assert runs["kto"]["measures"]["kl"] > 0.1
    assert runs["kto, divergence below 0"]["measures"]["kl"] == 0
    assert any(len(set(group["rewards"])) == 1 for group in recorded()["batches"]["groups"])
    losses = [tuple(run["norms"]) for name, run in runs.items() if "accumulated" not in name]
    assert len(set(losses)) == len(losses)


@pytest.mark.reference
def test_loss_and_gradient_are_those_of_trl_and_trl_computes_what_is_recorded(tmp_path: Path, cache: Path) -> None:
    trl = run_trl(tmp_path, recorded()["batches"])
    for name, backend, micro_batches in product(OURS, ("mlx", "cpu") if on_cpu() else ("mlx",), (1, 2)):
        batch = recorded()["batches"][RUNS[name].batch]
        loss, grads, _ = our_update(RUNS[name].method, batch, backend, micro_batches)
        differences = compare(loss, grads, float(trl[f"{name}/loss"]), our_names(trl, name))
        assert max(differences) < TOLERANCE, (name, backend, micro_batches, differences)
    # If not: look at what a new TRL changed, and record it.
    for name, theirs in recorded()["runs"].items():
        now = their_summary(trl, name)
        assert now.pop("measures") == pytest.approx(theirs["measures"], abs=1e-5), name
        for part, value in now.items():
            assert value == pytest.approx(theirs[part], rel=1e-4, abs=1e-5 * theirs["largest"]), (name, part)
