"""Runs on several ranks: one curve whatever their number, resumed by any number, and stopped together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from distributed.conftest import assert_one_curve, losses

from runner.checkpoints.verify import load_checkpoint
from runner.common.filesystem import FileSystem
from runner.common.free_ports import free_ports
from runner.models.device import on_cpu

WORDS = (
    "model=tiny",
    "data=tiny",
    "train.batch_size=8",  # of 50 rows: the last batch of an epoch has 2
    "train.iters=50",
    "train.report_every=1",
    "train.eval_every=25",
    "train.test=true",
    "checkpoint.every=10",
    "optimizer.learning_rate=1e-3",
    "train.averaging_power=3",
)
ENDLESS = ("model=tiny", "data=tiny", "train.batch_size=8", "train.iters=100000", "train.eval_every=100000")
ENDLESS += ("train.report_every=5", "checkpoint.every=10")


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def row_losses(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "row_losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(make_cli, tmp_path_factory):
    """The run on one process, which all others are compared with, and its command line."""
    cli = make_cli(tmp_path_factory.mktemp("alone"))
    cli(*WORDS, "hydra.run.dir=run")
    return cli, cli.folder / "run"


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_have_one_curve(alone, run_ranks, count):
    cli, whole = alone
    outputs = run_ranks(cli, count, *WORDS, f"hydra.run.dir=on{count}")
    run = cli.folder / f"on{count}"
    assert_one_curve(whole, run)
    assert f"ranks  {count}" in outputs[0] and "finished at step 50" in outputs[0]
    assert not any(output.replace("[ring]", "") for output in outputs[1:]), "only rank 0 prints"
    # Before the first update the weights are the same, and so is each row's loss, to the last digit.
    first, single = row_losses(run)[0], row_losses(whole)[0]
    if on_cpu():
        assert first == single and losses(run)[0][-1] == losses(whole)[0][-1]
    assert [row["split"] for row in row_losses(run)] == ["valid", "valid", "valid", "test"]


def test_a_run_moves_between_numbers_of_ranks(alone, run_ranks, start_ranks):
    """1 to 2 inside of an epoch of 7 batches, 2 to 4 across its edge, 4 to 1."""
    cli, whole = alone
    run = cli.folder / "elastic"
    run_ranks(cli, 1, *WORDS, "hydra.run.dir=elastic", "train.stop_at=10")
    run_ranks(cli, 2, "resume=elastic", "train.stop_at=21")
    run_ranks(cli, 4, "resume=elastic", "train.stop_at=30")
    run_ranks(cli, 1, "resume=elastic")
    assert_one_curve(whole, run)
    states = [json.loads((path / "checkpoints/step-0000050/train_state.json").read_text()) for path in (whole, run)]
    assert states[0]["position"] == states[1]["position"] and states[0].keys() == states[1].keys()


@pytest.mark.parametrize(
    ("victim", "number"),
    [(1, "SIGKILL"), pytest.param(0, "SIGKILL"), pytest.param(1, "SIGSTOP", marks=pytest.mark.long)],
)
def test_a_rank_that_is_gone_ends_all_within_ten_seconds(make_cli, tmp_path, start_ranks, run_ranks, victim, number):
    cli = make_cli(tmp_path)
    ranks = start_ranks(cli, 2, *ENDLESS, "hydra.run.dir=run")
    cli.wait_for(tmp_path / "run", 15, ranks.processes[0])
    lost, other = ranks.processes[victim], ranks.processes[1 - victim]
    start = time.monotonic()
    ranks.send(victim, signal.Signals[number])
    output, _ = other.communicate(timeout=30)
    assert time.monotonic() - start < 10
    assert f"rank {victim} (" in output and f"pid {lost.pid}) is lost" in output and other.returncode == 9
    lost.send_signal(signal.SIGKILL)
    lost.wait(timeout=10)
    if victim == 1:
        assert status(tmp_path / "run")["state"] == "failed" and "rank 1" in status(tmp_path / "run")["reason"]
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert load_checkpoint(newest, FileSystem()).checkpoint.step % 10 == 0
    [resumed] = run_ranks(cli, 1, "resume=run", f"train.stop_at={int(newest.name[5:]) + 1}")
    assert f"resumed from run/checkpoints/{newest.name}" in resumed.replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(("rank", "number"), [(1, "SIGTERM"), pytest.param(0, "SIGINT", marks=pytest.mark.long)])
def test_a_signal_to_any_rank_stops_all(make_cli, tmp_path, start_ranks, rank, number):
    cli = make_cli(tmp_path)
    ranks = start_ranks(cli, 2, *ENDLESS, "hydra.run.dir=run")
    cli.wait_for(tmp_path / "run", 10, ranks.processes[0])
    ranks.send(rank, signal.Signals[number])
    outputs = ranks.wait(60)
    assert ranks.codes == [128 + signal.Signals[number]] * 2, outputs
    found = status(tmp_path / "run")
    assert (found["state"], found["reason"], found["last_checkpoint"]) == ("stopped", number, found["step"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.long
def test_a_signal_during_an_evaluation_stops_all(make_cli, tmp_path, start_ranks, rank):
    rows = [{"prompt": f"{i} " * 20, "completion": "yes " * 20} for i in range(2000)]
    (tmp_path / "data").mkdir()
    for split, part in (("train", rows[:8]), ("valid", rows)):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    cli = make_cli(tmp_path)
    words = ("model=tiny", "data=folder", f"data.path={tmp_path / 'data'}", "train.iters=5", "hydra.run.dir=run")
    ranks = start_ranks(cli, 2, *words)
    for _ in range(600):
        if (tmp_path / "run" / "run.log").exists() and "ranks" in (tmp_path / "run" / "run.log").read_text():
            break
        time.sleep(0.05)
    time.sleep(1)
    start = time.monotonic()
    ranks.send(rank, signal.SIGTERM)
    outputs = ranks.wait(60)
    assert ranks.codes == [143, 143], outputs
    assert time.monotonic() - start < 10 and status(tmp_path / "run")["step"] == 0


def mlx_launch(cli, *words):
    """Start `mlx.launch` with two ranks of `python WORDS…`."""
    launcher = "import sys; from mlx._distributed_utils.launch import main; sys.exit(main())"
    command = [sys.executable, "-c", launcher, "-n", "2", "--backend", "ring"]
    command += ["--starting-port", str(free_ports(1)[0]), "--", sys.executable, *words]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=cli.folder, env=cli.environment, text=True, **pipes)


VICTIM = """
import os, runpy, signal, sys
if os.environ["MLX_RANK"] == sys.argv.pop():
    os.kill(os.getpid(), signal.SIGKILL)
runpy.run_module("runner", run_name="__main__", alter_sys=True)
"""


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_mlx_launch_ends_the_others_where_one_dies_before_it_joins(make_cli, tmp_path, victim):
    cli = make_cli(tmp_path)
    start = time.monotonic()
    output, _ = mlx_launch(cli, "-c", VICTIM, *ENDLESS, "hydra.run.dir=run", str(victim)).communicate(timeout=60)
    assert time.monotonic() - start < 10 and f"rank {victim} exited with code -9" in output, output


def test_mlx_launch_with_supervision_continues_after_a_kill(alone, make_cli, tmp_path):
    """The command of docs/distributed.md, with real imports; a rank is killed, and the run ends by itself."""
    cli, whole = alone
    process = mlx_launch(cli, "-m", "runner", *WORDS, f"hydra.run.dir={tmp_path / 'run'}", "supervise=true")
    pid = cli.wait_for(tmp_path / "run", 10, process)
    os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and status(tmp_path / "run")["state"] == "finished", output
    assert [entry["cause"] for entry in status(tmp_path / "run")["restarts"]] == ["SIGKILL"]
    assert_one_curve(whole, tmp_path / "run")


DRIFT = """
import sys
from runner.backends import blas
blas.load_blas()
import mlx.core as mx
from runner.cli.main import main
from runner.training import trainer

update = trainer.Trainer.update

def drifting(self):
    update(self)
    if self.state.progress.step in (12, 27):
        self.state.params = {name: array * mx.array(1 + 1e-6) for name, array in self.state.params.items()}

trainer.Trainer.update = drifting
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_ranks_that_round_differently_are_made_equal_again(alone, start_ranks):
    cli, whole = alone
    ranks = start_ranks(cli, 2, *WORDS, "hydra.run.dir=drift", words=[("-m", "runner"), ("-c", DRIFT)])
    outputs = ranks.wait()
    assert ranks.codes == [0, 0], outputs
    assert outputs[0].count("the weights of rank 1 differed from rank 0's, which are used") == 1
    assert_one_curve(whole, cli.folder / "drift")


def test_a_model_that_does_not_fit_a_machine_is_refused_before_it_is_loaded(make_cli, tmp_path, start_ranks):
    """Each rank holds all of a model: 3 TB of weights, of which only the config is there."""
    layer = {"hidden_size": 32768, "intermediate_size": 131072, "num_attention_heads": 128, "num_key_value_heads": 128}
    config = {"model_type": "llama", **layer, "num_hidden_layers": 40, "vocab_size": 320, "rms_norm_eps": 1e-5}
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "config.json").write_text(json.dumps(config))
    cli = make_cli(tmp_path)
    ranks = start_ranks(cli, 2, f"model.path={tmp_path / 'huge'}", "data=tiny", "hydra.run.dir=run")
    outputs = ranks.wait(60)
    assert ranks.codes == [2, 2], outputs
    assert "Every rank holds the whole model" in outputs[0] and " (" in outputs[0] and not outputs[1]
    assert re.search(r"There would fit: a model of up to about \d+\.\d billion parameters", outputs[0])
    assert not (tmp_path / "run").exists()


def test_what_several_ranks_cannot_do_is_refused(make_cli, tmp_path, run_ranks, start_ranks):
    cli = make_cli(tmp_path)
    ranks = start_ranks(cli, 2, "-m", "model=tiny", "data=tiny", "lora.rank=2,4")
    outputs = ranks.wait(60)
    assert ranks.codes == [2, 2] and "leave out -m" in outputs[0]
    ranks = start_ranks(cli, 2, "model=tiny", "data=tiny", "lora.rank=none")
    time.sleep(0.1)
    output = ranks.processes[0].communicate(timeout=60)[0]
    assert ranks.processes[0].returncode == 2 and "lora.rank" in output
    ranks.processes[1].kill()  # as mlx.launch does: nobody has told it anything
    ranks.wait(60)
