"""supervise=true: a run whose process is killed, or whose memory fails, continues by itself and ends equal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.backends.mlx_build import is_gpu_build
from runner.cli.overrides import parse_arguments
from runner.cli.supervise import _Supervisor
from runner.runs.restarts import restart_summary

OVERRIDES = (
    "model=tiny",
    "data=tiny",
    "schedule=cosine",
    "lora.dropout=0.2",
    "train.report_every=1",
    "train.eval_every=20",
    "checkpoint.every=5",
)
CRASHES = ("SIGSEGV", "out of memory")
"""What an allocation of MLX ends a process with where it gets no memory: on the CPU, and on a GPU."""
SITECUSTOMIZE = '''
"""Python imports this at its start. In supervised processes, or what they are forked from, it makes memory fail for
real: at each step of the list in FAILURES, once, by an allocation that no machine has room for."""

import importlib.util
import contextlib
import json
import os
import sys


def fail(kind):
    if kind == "python":
        bytearray(1 << 55)
    import mlx.core as mx

    mx.eval(mx.zeros((1 << 20, 1 << 26), dtype=mx.uint8))


def patch(module):
    update = module.Trainer.update

    def failing_update(trainer):
        with open(os.environ["FAILURES"]) as file:
            failures = json.load(file)
        step = trainer.state.progress.step
        if failures and step == failures[0][0]:
            with open(os.environ["FAILURES"], "w") as file:
                json.dump(failures[1:], file)
            fail(failures[0][1])
        update(trainer)

    module.Trainer.update = failing_update


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "runner.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (execute(module), patch(module))
        return spec


words = [os.path.basename(word) for word in sys.orig_argv]
if {"runner.cli.supervised", "runner.sweeps.launchers.worker", "forked_program.py"} & set(words):
    if os.environ.get("AT_START") == "crash":
        os.kill(os.getpid(), 11)
    sys.meta_path.insert(0, Finder())
'''


@pytest.fixture(scope="session")
def site_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return folder


@pytest.fixture
def failing_cli(cli, tmp_path, site_folder):
    """The command line, in whose supervised processes memory fails at the steps that `failures.json` lists."""
    cli.imports_for_itself = True
    failures = tmp_path / "failures.json"
    failures.write_text("[]")
    cli.environment["PYTHONPATH"] = f"{site_folder}:{cli.environment['PYTHONPATH']}"
    cli.environment["FAILURES"] = str(failures)
    return cli


def read_status(run: Path) -> dict:
    try:
        return json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def wait_for_child(run: Path, supervisor: subprocess.Popen, former: set[int], step: int) -> int:
    """Wait until a child that is none of the `former` ones has made the update `step`, and return its pid."""
    for _ in range(12000):
        assert supervisor.poll() is None, supervisor.communicate()[0]
        status = read_status(run)
        if status.get("state") == "running" and status["pid"] not in former and status["step"] >= step:
            return status["pid"]
        time.sleep(0.005)
    raise AssertionError(f"{run} did not reach step {step}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "memory_fails", "iters"),
    [
        pytest.param((signal.SIGKILL,), (20, 34), 50, id="three ways"),
        pytest.param(
            (signal.SIGKILL, signal.SIGABRT, signal.SIGBUS), (46, 60), 80, id="five ways", marks=pytest.mark.long
        ),
    ],
)
def test_a_run_whose_process_dies_in_several_ways_equals_one_left_alone(
    failing_cli, inline, tmp_path, assert_equal_runs, signals, memory_fails, iters
):
    steps = random.Random("supervise")
    inline(*OVERRIDES, f"train.iters={iters}", "hydra.run.dir=alone")
    # Memory fails twice behind the signals: as MLX's own crash, and as Python's exception.
    (tmp_path / "failures.json").write_text(json.dumps([*zip(memory_fails, ("mlx", "python"), strict=True)]))
    run, children = tmp_path / "run", set[int]()
    overrides = (*OVERRIDES, f"train.iters={iters}", "hydra.run.dir=run", "supervise=true")
    supervisor = failing_cli.start(*overrides, fork=len(signals) == 1)
    for number, first in zip(signals, (2, 15, 28), strict=False):
        child = wait_for_child(run, supervisor, children, steps.randint(first, first + 9))
        os.kill(child, number)
        children.add(child)
    output, _ = supervisor.communicate(timeout=300)
    assert supervisor.returncode == 0, output
    assert_equal_runs(tmp_path / "alone", run)

    status = read_status(run)
    assert status["state"] == "finished" and "reason" not in status
    causes = [entry["cause"] for entry in status["restarts"]]
    assert len(causes) == len(signals) + 2
    assert {*(number.name for number in signals), "out of memory"} <= {*causes} and {*CRASHES} & {*causes}
    log = (run / "run.log").read_text()
    for entry in status["restarts"]:
        begin = "from the beginning" if entry["checkpoint"] is None else f"from step {entry['checkpoint']}"
        line = f"{entry['cause']} after step {entry['step']}: starting again {begin}"
        assert f"runner: {line}" in output and line in log
    last = status["restarts"][-1]["checkpoint"]
    assert f"resumed from {run}/checkpoints/step-{last:07d} at step {last}" in log
    assert "changed on resume: train.grad_checkpoint False -> True" in log
    summary = restart_summary(status)
    assert summary is not None and summary.startswith(f"{len(causes)} (") and "1 SIGKILL" in summary
    assert f"restarts {summary}" in inline("show", "run") and f"restarts: {summary}" in inline("ls", ".")


def test_three_deaths_before_anything_is_stored_end_a_supervisor_that_imported_nothing_heavy(failing_cli, tmp_path):
    program = (
        "import os, sys; from runner.cli.main import main; code = main(['model=tiny', 'data=tiny', 'supervise=true']);"
        "heavy = {'mlx', 'hydra', 'omegaconf', 'numpy', 'transformers', 'rich'} & set(sys.modules);"
        "kilobytes = os.popen(f'ps -o rss= -p {os.getpid()}').read().strip();"
        "print(code, heavy, kilobytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**failing_cli.environment, "AT_START": "crash"},
        capture_output=True,
        text=True,
    )
    assert done.stderr.count("starting again") == 2
    assert "SIGSEGV before the run had stored anything: 3 times in a row." in done.stderr
    code, heavy, kilobytes = done.stdout.split()
    assert (code, heavy) == ("8", "set()")
    assert int(kilobytes) < 50_000


@pytest.mark.slow
@pytest.mark.long
def test_three_deaths_in_a_row_without_a_new_checkpoint_end_the_run_with_what_was_printed_last(failing_cli, tmp_path):
    (tmp_path / "failures.json").write_text('[[7, "mlx"], [7, "python"], [7, "mlx"]]')
    overrides = (*OVERRIDES, "train.iters=20", "checkpoint.background=false", "hydra.run.dir=run")
    output = failing_cli(*overrides, "supervise=true", expect=8)
    assert output.count("from step 5") == 2
    assert any(f"{cause} after step 7: 3 times in a row without a new checkpoint" in output for cause in CRASHES)
    assert "The end of run/run.log" in output and "step     7/20  train loss" in output.split("The end of")[1]
    assert "resume=run" in output
    status = read_status(tmp_path / "run")
    assert status["state"] == "interrupted" and "3 times in a row" in status["reason"]
    failing_cli("resume=run", "supervise=true")
    assert read_status(tmp_path / "run")["state"] == "finished"


@pytest.mark.slow
@pytest.mark.long
def test_a_process_is_replaced_after_the_typed_number_of_updates(cli, inline, tmp_path, assert_equal_runs):
    inline(*OVERRIDES, "train.iters=12", "hydra.run.dir=alone")
    output = cli(*OVERRIDES, "train.iters=12", "hydra.run.dir=run", "supervise=5")
    assert [line for line in output.splitlines() if line.startswith("runner:")] == [
        f"runner: process replaced by a new one at step {step}" for step in (5, 10)
    ]
    assert_equal_runs(tmp_path / "alone", tmp_path / "run")
    steps = [(entry["step"], entry["checkpoint"]) for entry in read_status(tmp_path / "run")["restarts"]]
    assert steps == [(5, 5), (10, 10)]


def sweep_overrides(launcher: str) -> tuple[str, ...]:
    return (
        "-m", *OVERRIDES, "train.iters=40", "lora.rank=2,4", f"hydra/launcher={launcher}", "hydra.sweep.dir=s",
        "supervise=true",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
def test_the_jobs_of_a_sweep_whose_workers_die_equal_jobs_left_alone(failing_cli, inline, tmp_path, assert_equal_runs):
    for job, rank in ((0, 2), (1, 4)):
        inline(*OVERRIDES, "train.iters=40", f"lora.rank={rank}", f"hydra.run.dir=alone{job}")
    launcher = failing_cli.start(*sweep_overrides("process"), "hydra.launcher.jobs=1")
    workers = set[int]()
    worker = wait_for_child(tmp_path / "s/0", launcher, workers, 8)
    os.kill(worker, signal.SIGKILL)
    output, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, output
    causes = [[entry["cause"] for entry in read_status(tmp_path / f"s/{job}").get("restarts", [])] for job in (0, 1)]
    assert causes == [["SIGKILL"], []]
    assert "job 0   SIGKILL after step" in output
    pids = {read_status(tmp_path / f"s/{job}")["pid"] for job in (0, 1)}
    assert len(pids) == (2 if is_gpu_build() else 1)  # a process has to stay below the limits of a GPU
    for job in (0, 1):
        assert_equal_runs(tmp_path / f"alone{job}", tmp_path / f"s/{job}")


@pytest.mark.slow
@pytest.mark.long
def test_a_job_that_dies_three_times_without_a_checkpoint_fails_and_the_others_run(failing_cli, tmp_path):
    (tmp_path / "failures.json").write_text('[[3, "mlx"], [3, "python"], [3, "mlx"]]')
    output = failing_cli(*sweep_overrides("process"), "hydra.launcher.jobs=1", expect=1)
    assert output.count("starting again from the beginning") == 2
    assert "job 0   out of memory after step 3" in output
    assert "3 times in a row without a new checkpoint" in failing_cli.results(tmp_path / "s")[0]["reason"]
    assert read_status(tmp_path / "s/1")["state"] == "finished"
    failing_cli("resume=s", "supervise=true")
    assert read_status(tmp_path / "s/0")["state"] == "finished"


@pytest.mark.parametrize("launcher", ["serial", "joblib"])
def test_a_sweep_whose_jobs_share_a_process_is_refused_before_it_is_recorded(inline, launcher):
    output = inline(*sweep_overrides(launcher), expect=2)
    assert "supervise=true in a sweep needs a process for each job: type hydra/launcher=process" in output
    assert not (inline.folder / "s").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_recipe_that_is_a_sweep_asks_for_m(cli):
    output = cli("experiment=rank_sweep", "model=tiny", "data=tiny", "supervise=true", expect=2)
    assert "Type -m as well" in output


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "to_both"), [(signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGINT, True)]
)
def test_a_stop_reaches_the_child_once_and_the_run_is_not_started_again(cli, tmp_path, number, to_both):
    """A terminal's Ctrl-C is sent to both processes, and a second signal would end the child without a save."""
    overrides = (*OVERRIDES, "train.iters=3000", "hydra.run.dir=run", "supervise=true")
    supervisor = cli.start(*overrides, start_new_session=True)
    wait_for_child(tmp_path / "run", supervisor, set(), 3)
    (os.killpg if to_both else os.kill)(supervisor.pid, number)
    output, _ = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 128 + number and "starting again" not in output
    status = read_status(tmp_path / "run")
    assert (status["state"], status["reason"]) == ("stopped", number.name)
    assert status["step"] == status["last_checkpoint"]


@pytest.mark.slow
@pytest.mark.long
def test_a_child_whose_supervisor_is_killed_saves_and_stops(cli, tmp_path):
    supervisor = cli.start(*OVERRIDES, "train.iters=3000", "hydra.run.dir=run", "supervise=true")
    child = wait_for_child(tmp_path / "run", supervisor, set(), 3)
    supervisor.kill()
    output, _ = supervisor.communicate(timeout=60)  # until the child, too, has closed it
    assert "the supervising process has ended; saving and stopping" in output
    status = read_status(tmp_path / "run")
    assert status["pid"] == child and (status["state"], status["reason"]) == ("stopped", "SIGTERM")
    assert status["step"] == status["last_checkpoint"]


@pytest.mark.slow
@pytest.mark.long
def test_a_refused_run_is_refused_once_with_its_exit_code(cli):
    output = cli("model=tiny", "data=tiny", "data.path=nowhere", "supervise=true", expect=2)
    assert output.count("nowhere") == 1


def next_arguments(run: Path, *typed: str, changes: dict[str, bool] | None = None) -> list[str]:
    """The command line of the next start, after a child that reported `run` died."""
    supervisor = _Supervisor(typed, parse_arguments(typed))
    supervisor._run = run
    supervisor._policy.changes.update(changes or {})
    return supervisor._next_arguments()


def test_the_next_start_resumes_the_run_and_types_again_what_no_config_stores(tmp_path):
    typed = ("model=tiny", "+lora.rank=4", "train.stop_at=9", "model.trust_remote_code=true", "hydra.run.dir=x")
    typed = ("--config-dir", str(tmp_path), *typed, "hydra/job_logging=none", "repeat=old", "supervise=20")
    kept = ["train.stop_at=9", "model.trust_remote_code=true", "hydra/job_logging=none", "supervise=20"]
    # Before the config is stored, the same directory is taken over; then the run there is resumed.
    again = [a for a in typed if a != "hydra.run.dir=x"]
    assert next_arguments(tmp_path, *typed) == [*again, f"hydra.run.dir={tmp_path}"]
    (tmp_path / "config.yaml").write_text("{}")
    resumed = [f"resume={tmp_path}", "--config-dir", str(tmp_path), *kept]
    assert next_arguments(tmp_path, *typed) == resumed
    changes = {"train.grad_checkpoint": True}
    assert next_arguments(tmp_path, *typed, changes=changes) == [*resumed, "train.grad_checkpoint=true"]


def test_what_is_typed_with_resume_is_typed_again_with_the_directory_of_the_run(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    typed = (f"resume={tmp_path}/old/checkpoints/step-0000002", "checkpoint.keep_last=9", "hydra.run.dir=y")
    assert next_arguments(tmp_path, *typed) == [f"resume={tmp_path}", "checkpoint.keep_last=9"]
    typed = (*typed, "train.grad_checkpoint=false")
    changed = next_arguments(tmp_path, *typed, changes={"train.grad_checkpoint": True})
    assert changed == [f"resume={tmp_path}", "checkpoint.keep_last=9", "train.grad_checkpoint=true"]


@pytest.mark.slow
@pytest.mark.long
def test_on_a_terminal_the_child_draws_its_live_line_and_ctrl_c_stops_the_run(cli, tmp_path):
    run, output, killed, stopped = tmp_path / "run", b"", 0, False
    overrides = [*OVERRIDES, "train.iters=5000", "hydra.run.dir=run", "supervise=true"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cli.folder)
        os.execve(cli.python, [cli.python, "-m", "runner", *overrides], {**cli.environment, "TERM": "xterm"})
    with contextlib.suppress(OSError):  # Linux reports the end of the other side as an error
        while data := os.read(terminal, 65536):
            output += data
            status = read_status(run)
            if not killed and status.get("step", 0) >= 7:
                killed = status["pid"]
                os.kill(killed, signal.SIGKILL)
            if killed and not stopped and status.get("pid") not in (None, killed) and status["step"] >= 14:
                stopped = bool(os.write(terminal, b"\x03"))
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    before, after = output.split(b"runner: SIGKILL after step")
    assert b"\x1b[?25l" in before and b"training" in before  # the live line hides the cursor
    assert before.endswith(b"\r\x1b[2K\x1b[?25h") and b"training" in after
    assert (read_status(run)["state"], read_status(run)["reason"]) == ("stopped", "SIGINT")
