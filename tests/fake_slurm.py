"""A SLURM of one machine for tests, as far as submitit uses it: sbatch, srun, sacct, scancel and scontrol.

`install(folder)` makes the commands, which keep their state in `folder`. Each job of an array is a process that runs
the script; `fail_node` ends one as the loss of its node does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

_COMMANDS = ("sbatch", "srun", "sacct", "scancel", "scontrol")
_STATES = "FAKE_SLURM"
_GRACE_SECONDS = 5.0
"""KillWait: from SIGTERM to SIGKILL."""


def install(folder: Path) -> dict[str, str]:
    """Make the commands in `folder`, and return the environment that finds them."""
    (folder / "bin").mkdir(parents=True)
    for name in _COMMANDS:
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).absolute()} {name} "$@"\n')
        script.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", _STATES: str(folder)}


def state_of(folder: Path, job: str) -> str:
    """Return the state of a job, such as RUNNING."""
    return (folder / job).read_text()


def fail_node(folder: Path, job: str) -> None:
    """End a job at once, with all its processes, as when its node fails."""
    (folder / f"{job}.end").write_text("NODE_FAIL")
    _signal_all(folder, job, signal.SIGKILL)


def _signal_all(folder: Path, job: str, number: signal.Signals) -> None:
    """Send a signal to the step of a job; SIGKILL to all processes that it has started."""
    step = int((folder / f"{job}.step").read_text())
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    found = {step}
    while number == signal.SIGKILL and (more := {pid for pid, parent in parents.items() if parent in found} - found):
        found |= more
    for pid in found:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _sbatch(folder: Path, script: str) -> None:
    number = 100 + len([*folder.glob("*.sh")])
    copy = folder / f"{number}.sh"
    copy.write_text(Path(script).read_text())
    array = re.search(r"^#SBATCH --array=0-(\d+)%", copy.read_text(), re.M)
    for job in [f"{number}_{i}" for i in range(int(array[1]) + 1)] if array else [str(number)]:
        (folder / job).write_text("PENDING")
        command = [sys.executable, __file__, "run", job, str(copy)]
        subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"Submitted batch job {number}")


def _run(folder: Path, job: str, script: str) -> None:
    """Run a job, again as long as it asks for its place in the queue."""
    main, _, index = job.partition("_")
    variables = {"SLURM_JOB_ID": main, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0"}
    variables |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "FAKE_SLURM_JOB": job}
    if index:
        variables |= {"SLURM_ARRAY_JOB_ID": main, "SLURM_ARRAY_TASK_ID": index}
    while True:
        (folder / job).write_text("RUNNING")
        code = subprocess.call(["bash", script], env={**os.environ, **variables})
        if not (requeued := folder / f"{job}.requeue").exists():
            break
        requeued.unlink()
        (folder / job).write_text("PENDING")
        time.sleep(0.5)
    end = folder / f"{job}.end"
    (folder / job).write_text(end.read_text() if end.exists() else "COMPLETED" if code == 0 else "FAILED")


def _srun(folder: Path, *arguments: str) -> None:
    output = arguments[arguments.index("--output") + 1]
    first = next(i for i, word in enumerate(arguments) if word == sys.executable)
    for name, value in (
        ("%A", "SLURM_ARRAY_JOB_ID"),
        ("%a", "SLURM_ARRAY_TASK_ID"),
        ("%j", "SLURM_JOB_ID"),
        ("%t", ""),
    ):
        output = output.replace(name, os.environ.get(value, "0"))
    with open(output, "a") as log:
        step = subprocess.Popen(arguments[first:], stdout=log, stderr=log)
        (folder / f"{os.environ['FAKE_SLURM_JOB']}.step").write_text(str(step.pid))
        sys.exit(step.wait() != 0)


def _sacct(folder: Path, *arguments: str) -> None:
    print("JobID|State|NodeList")
    for path in sorted(folder.iterdir()):
        if re.fullmatch(r"\d+(_\d+)?", path.name) and path.name.partition("_")[0] in arguments:
            print(f"{path.name}|{path.read_text()}|node")


def _scancel(folder: Path, job: str) -> None:
    (folder / f"{job}.end").write_text("CANCELLED")
    if (folder / f"{job}.step").exists() and state_of(folder, job) == "RUNNING":
        _signal_all(folder, job, signal.SIGTERM)
        if os.fork() == 0:
            time.sleep(_GRACE_SECONDS)
            _signal_all(folder, job, signal.SIGKILL)


def main() -> None:
    """Do what the command does by whose name this was called."""
    folder, command, arguments = Path(os.environ[_STATES]), sys.argv[1], sys.argv[2:]
    if command == "scontrol":
        (folder / f"{arguments[-1]}.requeue").touch()
        return
    actions = {"sbatch": _sbatch, "run": _run, "srun": _srun, "sacct": _sacct, "scancel": _scancel}
    actions[command](folder, *arguments)


if __name__ == "__main__":
    main()
