"""Hydra's default choices of a sweeper and a launcher."""

from __future__ import annotations

import pytest

TINY = ("-m", "experiment=smoke", "train.iters=1", "seed=1,2", "hydra.sweep.dir=s")


@pytest.mark.parametrize("launcher", ["serial", "basic", pytest.param("process", marks=pytest.mark.long)])
def test_the_names_of_hydras_defaults_mean_ours(inline, launcher):
    inline(*TINY, "hydra/sweeper=basic", f"hydra/launcher={launcher}", "train.stop_at=1", "train.iters=2")
    inline("resume=s")
    assert {row["state"] for row in inline.results(inline.folder / "s").values()} == {"finished"}
