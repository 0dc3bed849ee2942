"""SIGKILL while a row, a sample, the status or the config is written: no row is lost or repeated; runs end equal."""

from __future__ import annotations

import json
import shutil

import pytest

pytestmark = [pytest.mark.fault(4), pytest.mark.slow]

OVERRIDES = (
    "model=tiny",
    "data=tiny",
    "lora.dropout=0.2",
    "train.iters=6",
    "train.report_every=2",
    "train.eval_every=3",
    "train.test=true",
    "checkpoint.every=2",
    "data.metric=exact_match",
    "data.metric_rows=2",
    "data.max_new_tokens=4",
)
# The start of the file name, the system call, what happens at it, and the least number of such calls.
KILLS = [
    ("metrics.jsonl", "write", "half", 8),
    ("metrics.jsonl", "write", "kill", 8),
    ("samples.jsonl", "write", "half", 4),
    ("row_losses.jsonl", "write", "half", 4),
    (".status.json.", "write", "half", 8),
    (".status.json.", "rename", "kill", 8),
    (".config.yaml.", "write", "half", 1),
    (".config.yaml.", "rename", "kill", 1),
]


def split_lines(run, name):
    return (run / name).read_bytes().split(b"\n")


@pytest.mark.parametrize("chunk", range(2))
def test_a_run_killed_while_it_writes_resumes_without_a_lost_or_repeated_row(
    make_cli, tmp_path, run_with_calls, fault_environment, assert_ended_equal, cases, chunk
):
    whole, calls = run_with_calls(*OVERRIDES)
    faults = []
    for name, call, do, minimum in KILLS:
        number = sum(path.startswith(name) and kind == call for kind, path in calls)
        assert number >= minimum, name
        if name.startswith(".status"):
            number -= 2  # two saves that complete between two updates are written once
        faults += [(name, call, do, at) for at in range(number)]
    for name, call, do, at in cases.some(faults, quick=3)[chunk::2]:
        cli = make_cli(tmp_path / f"{name}-{do}-{at}")
        run = cli.folder / "run"
        fault = fault_environment(run, name=f"/run/{name}", calls=call, at=at, do=do)
        cli(*OVERRIDES, "hydra.run.dir=run", expect=-9, env=fault)
        if name.endswith(".jsonl"):
            *rows, torn = split_lines(run, name)
            assert len(rows) == at and bool(torn) == (do == "half")
        if do == "half" and name.endswith(".jsonl"):
            with pytest.raises(ValueError):
                json.loads(torn)
        if (run / "config.yaml").exists():
            cli("resume=run")
        else:
            cli(*OVERRIDES, "hydra.run.dir=run")
        assert_ended_equal(whole, run)
        for file in ("metrics.jsonl", "samples.jsonl", "row_losses.jsonl"):
            *rows, rest = split_lines(run, file)
            assert rest == b"" and len(rows) == len(split_lines(whole, file)) - 1
        shutil.rmtree(cli.folder)
        cases.done()


@pytest.mark.long
def test_a_sweep_killed_while_it_writes_the_config_of_a_job_resumes(
    cli, fault_environment, undisturbed, assert_ended_equal
):
    overrides = ("model=tiny", "data=tiny", "train.iters=2", "train.eval_every=2")
    run = cli.folder / "sweep/0"
    fault = fault_environment(run, name=".config.yaml.", calls="write", at=0, do="half")
    cli(*overrides, "-m", "seed=0", "hydra.sweep.dir=sweep", expect=-9, env=fault)
    assert list(run.glob(".config.yaml.*")) and not (run / "config.yaml").exists()
    cli("resume=sweep")
    assert_ended_equal(undisturbed(*overrides), run)
