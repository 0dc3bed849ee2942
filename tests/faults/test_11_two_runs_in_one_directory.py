"""A second process in the directory of a running one exits at once and names the holder; a killed one holds no lock."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fault(11), pytest.mark.slow]

OVERRIDES = (
    "model=tiny",
    "data=tiny",
    "train.iters=1000000",
    "train.report_every=10",
    "train.eval_every=1000000",
    "checkpoint.every=20",
)


@pytest.fixture
def holder(cli):
    """A run that trains in `runs/run`, past its first checkpoint, and is killed at the end."""
    process = cli.start(*OVERRIDES, "hydra.run.dir=runs/run")
    first = cli.folder / "runs/run/checkpoints/step-0000020"
    while not first.exists() and process.poll() is None:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[0]
    yield process
    process.kill()
    process.communicate()


class SecondProcess:
    """The program, started where another is running: output, duration in seconds, and imported modules."""

    def __init__(self, cli, *arguments: str) -> None:
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "runner", *arguments],
            cwd=cli.folder,
            env=cli.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.seconds = time.perf_counter() - begun
        self.code = done.returncode
        lines = done.stderr.splitlines()
        self.out = "\n".join(line for line in lines if not line.startswith("import time:"))
        self.imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


def test_a_second_process_exits_at_once_and_names_the_holder_whatever_path_it_was_given(cli, holder):
    os.kill(holder.pid, signal.SIGSTOP)  # it holds the directory all the same, and leaves the processor to the others
    (cli.folder / "link").symlink_to("runs")
    (cli.folder / "direct").symlink_to("runs/run")
    durations = []
    for arguments in (
        ("resume=runs/run",),
        ("resume=link/run",),
        ("resume=direct",),
        (*OVERRIDES, "hydra.run.dir=runs/run"),
        (*OVERRIDES, "hydra.run.dir=link/run"),
    ):
        second = SecondProcess(cli, *arguments)
        assert second.code == 3, second.out
        assert f"in use by pid {holder.pid} on {socket.gethostname()} since 20" in second.out
        assert "hydra.main" in str(second.imported)  # the list is not empty: else the next line could not fail
        assert not {name for name in second.imported if name.split(".")[0] in ("mlx", "mlx_lm", "transformers")}
        durations.append(second.seconds)
    assert min(durations) < 2  # mostly the start of Python; the slowest depends on the load of the machine
    assert holder.poll() is None


def test_the_first_process_is_not_affected(cli, holder):
    metrics = cli.folder / "runs/run/metrics.jsonl"
    assert SecondProcess(cli, "resume=runs/run", "train.report_every=1").code == 3
    size = metrics.stat().st_size
    end = time.monotonic() + 60
    while metrics.stat().st_size == size and time.monotonic() < end:
        time.sleep(0.05)
    steps = [json.loads(line)["step"] for line in metrics.read_bytes().splitlines(keepends=True) if line[-1:] == b"\n"]
    assert metrics.stat().st_size > size and steps == [0, *range(10, 10 * len(steps), 10)]


def test_a_killed_process_holds_no_lock(cli, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert f"pid {holder.pid} " in (cli.folder / "runs/run/.lock").read_text()  # the text stays, the lock does not
    saved = sorted((cli.folder / "runs/run/checkpoints").glob("step-*"))[-1]
    stop = int(Path(saved).name[5:]) + 3
    out = cli("resume=runs/run", f"train.stop_at={stop}")
    assert "resumed from" in out
    status = json.loads((cli.folder / "runs/run/status.json").read_text())
    assert (status["state"], status["step"], status["pid"] != holder.pid) == ("stopped", stop, True)
