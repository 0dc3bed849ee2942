"""Ranks over Open MPI, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed.conftest import assert_one_curve

WORDS = (
    "model=tiny",
    "data=tiny",
    "train.batch_size=8",
    "train.iters=20",
    "train.report_every=1",
    "train.eval_every=10",
)


@pytest.mark.long
def test_ranks_over_mpi_have_one_curve(make_cli, tmp_path):
    """They are told where rank 0 waits through MPI itself, and MPI is finalized at the end."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("mpirun is not found")
    cli = make_cli(tmp_path)
    cli(*WORDS, "hydra.run.dir=alone")
    names = ("libmpi.so.40", "libmpi.dylib")
    found = [path for name in names if (path := Path(mpirun).parent.parent / "lib" / name).exists()]
    library = {"MLX_MPI_LIBNAME": str(found[0])} if found else {}
    command = [mpirun, "--oversubscribe", "-n", "2", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    environment = {**cli.environment, **library}
    for name in (*library, "PYTHONPATH", "OPENBLAS_NUM_THREADS", "RUNNER_CACHE"):
        command += ["-x", name] if name in environment else []
    done = subprocess.run(
        [*command, sys.executable, "-m", "runner", *WORDS, "hydra.run.dir=two"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "ranks  2" in done.stdout, done.stdout + done.stderr
    assert "finalize" not in done.stderr
    assert_one_curve(tmp_path / "alone", tmp_path / "two")
