"""SIGKILL at every system call of a save: the newest valid checkpoint is the previous or the new one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fault(2)

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(2))
def test_a_run_killed_at_any_call_of_a_save_keeps_the_old_or_the_new_checkpoint_and_resumes_equal(
    make_cli,
    tmp_path,
    overrides,
    run_with_calls,
    fault_environment,
    newest_checkpoint,
    assert_same_state,
    assert_ended_equal,
    cases,
    chunk,
):
    overrides = (*overrides, "checkpoint.keep_last=9")  # so that all states can be compared
    reference, calls = run_with_calls(*overrides)
    calls = [(call, path) for call, path in calls if path.startswith("checkpoints")]
    new = [i for i, (_, path) in enumerate(calls) if "/.tmp-step-0000004-" in path]
    assert len(new) > 20
    committed = next(i for i in new if calls[i][0] == "rename")
    last = next(i for i, (_, path) in enumerate(calls) if "/.tmp-step-0000006-" in path)
    faults = [(at, "kill") for at in range(new[0], last + 1)]
    faults += [(at, "half") for at in new if calls[at][0] == "write"]
    for at, do in cases.some(faults, quick=2)[chunk::2]:
        cli = make_cli(tmp_path / f"{at}-{do}")
        run = cli.folder / "run"
        cli(*overrides, "hydra.run.dir=run", expect=-9, env=fault_environment(run / "checkpoints", at=at, do=do))
        loaded = newest_checkpoint(run)
        assert loaded.checkpoint.step == (4 if at > committed else 2), calls[at]
        assert_same_state(loaded, reference)
        cli("resume=run")
        assert_ended_equal(reference, run)
        shutil.rmtree(cli.folder)
        cases.done()


@pytest.mark.parametrize("do", ["kill", "half", "repair"])
def test_a_store_killed_at_any_call_of_a_save_keeps_the_old_or_the_new_checkpoint(
    tmp_path, fault_environment, cases, do
):
    """One small process for each case: first and further saves, replacements, rotations, and repairs of them."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "LD_PRELOAD": fault_environment()["LD_PRELOAD"]}
    command = [sys.executable, str(HERE / "store_kills.py"), str(tmp_path.resolve()), do]
    command.append("all" if cases.full else "some")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    if do == "half":
        assert kills.pop("a rotation") == 0  # it writes nothing
    assert min(kills.values()) >= 2, kills
    cases.done(sum(kills.values()))
