"""Hydra's default choices of a sweeper and a launcher."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow
TINY = ("-m", "experiment=smoke", "train.iters=1", "seed=1,2", "hydra.sweep.dir=s")


@pytest.mark.parametrize("launcher", ["serial", "process", "basic"])
def test_the_names_of_hydras_defaults_mean_ours(cli, launcher):
    cli(*TINY, "hydra/sweeper=basic", f"hydra/launcher={launcher}", "train.stop_at=1", "train.iters=2")
    cli("resume=s")
    assert {row["state"] for row in cli.results(cli.folder / "s").values()} == {"finished"}
