"""Sweepers and launchers of Hydra and of its plugins work beside ours."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow
TINY = ("-m", "experiment=smoke", "train.iters=1", "seed=1,2", "hydra.sweep.dir=s")


@pytest.mark.parametrize("launcher", ["serial", "process", "basic"])
def test_hydras_own_sweeper_runs_with_every_launcher(cli, launcher):
    cli(*TINY, "hydra/sweeper=basic", f"hydra/launcher={launcher}")
    assert all((cli.folder / f"s/{number}/adapters").is_dir() for number in (0, 1))


def test_hydras_own_launcher_runs_our_sweeps_and_finishes_them(cli):
    cli(*TINY, "hydra/launcher=basic", "train.stop_at=1", "train.iters=2")
    cli("resume=s")
    assert {row["state"] for row in cli.results(cli.folder / "s").values()} == {"finished"}
