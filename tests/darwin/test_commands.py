"""What a user of a Mac types, in a simulated one: see simulated_macos.py for what that proves and what it does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS is simulated on Linux")
SMALL = ("experiment=smoke", "train.iters=4", "checkpoint.every=2", "train.eval_every=2")


@pytest.fixture(scope="module")
def mac(simulated_python: Path, make_cli: Callable, tmp_path_factory: pytest.TempPathFactory):
    """The command line in a simulated macOS, in a folder with `run`, a run of four updates."""
    cli = make_cli(tmp_path_factory.mktemp("mac"))
    cli.python = simulated_python
    cli.environment["RUNNER_CACHE"] = str(simulated_python.parents[1] / "cache")
    out = cli(*SMALL, "hydra.run.dir=run")
    assert "device GPU" in out and "BLAS" not in out
    return cli


def test_a_stopped_run_resumes_to_an_equal_one(mac, assert_equal_runs):
    mac(*SMALL, "train.stop_at=3", "hydra.run.dir=stopped")
    mac("resume=stopped")
    assert_equal_runs(mac.folder / "run", mac.folder / "stopped")


def test_a_sweep_runs_one_job_at_a_time_and_does_not_speak_of_blas(mac):
    out = mac("-m", *SMALL, "lora.rank=2,4", "hydra/launcher=process", "hydra.sweep.dir=sweep")
    assert "processes: 1 at once; output in" in out
    assert [row["state"] for row in mac.results(mac.folder / "sweep").values()] == ["finished"] * 2


def test_runs_are_verified_generate_and_are_exported(mac):
    assert "all whole" in mac("verify", "run")
    assert "adapter" in mac("generate", "run", "2 + 2", "--max-tokens", "3", "--compare-base")
    mac("export", "run", "--to", "fused", "--out", "exported")
    assert json.loads((mac.folder / "exported/config.json").read_text())["model_type"] == "llama"
