"""A full disk, a file size limit, EIO: exit code 74 with path and space, the previous checkpoint intact, and an equal
run after a resume."""

from __future__ import annotations

import errno
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

pytestmark = [pytest.mark.fault(7), pytest.mark.slow]

KEEP_ALL = "checkpoint.keep_last=9"


def assert_reported(out, path, *, space):
    """Check that the message names the path, and what space is needed and free, without a traceback."""
    assert "Traceback" not in out and str(path) in out, out
    assert not space or re.search(r"needs [\d.,]+ \w+, has [\d.,]+ \w+", out), out


@pytest.mark.parametrize("chunk", range(2))
def test_a_failing_call_inside_a_save_exits_with_74_and_the_run_resumes_equal(
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
    all_states, _ = run_with_calls(*overrides, KEEP_ALL)
    overrides = (*overrides, "checkpoint.keep_last=1")  # so that the second save removes the first
    whole, calls = run_with_calls(*overrides)
    calls = [(call, path) for call, path in calls if path.startswith("checkpoints")]
    begins = next(i for i, (_, path) in enumerate(calls) if "/.tmp-step-0000004-" in path)
    committed = next(i for i in range(begins, len(calls)) if calls[i][0] == "rename")
    ends = next(i for i, (_, path) in enumerate(calls) if "/.tmp-step-0000006-" in path)
    saving = [i for i in range(begins, ends) if "/step-" not in calls[i][1] or calls[i][0] == "rename"]
    faults = [(at, errno.EIO) for at in saving]
    faults += [(at, errno.ENOSPC) for at in saving if calls[at][0] in ("open", "mkdir", "write", "fsync")]
    assert len(faults) > 40
    for at, number in cases.some(faults, quick=3)[chunk::2]:
        cli = make_cli(tmp_path / f"{at}-{number}")
        run = cli.folder / "run"
        out = cli(
            *overrides, "hydra.run.dir=run", expect=74, env=fault_environment(run / "checkpoints", at=at, do=number)
        )
        assert_reported(out, run / "checkpoints", space=number == errno.ENOSPC and calls[at][0] == "write")
        assert errno.errorcode[number] in out
        found = newest_checkpoint(run)
        assert found.checkpoint.step == (4 if at > committed else 2), calls[at]
        assert_same_state(found, all_states, but=("hyperparameters",))
        cli("resume=run")
        assert_ended_equal(whole, run)
        shutil.rmtree(cli.folder)
        cases.done()


@pytest.mark.long
def test_a_file_size_limit_exits_with_74_and_the_run_resumes_equal_without_it(
    make_cli, tmp_path, overrides, run_with_calls, newest_checkpoint, assert_same_state, assert_ended_equal, cases
):
    whole, _ = run_with_calls(*overrides, KEEP_ALL)
    for limit in cases.some([6_000, 10_000], quick=1):  # bytes: fewer than the adapters have, or than the optimizer
        cli = make_cli(tmp_path / f"{limit}")
        run = cli.folder / "run"
        cli(*overrides, KEEP_ALL, "hydra.run.dir=run", "train.stop_at=2")
        done = subprocess.run(
            [sys.executable, "-m", "runner", "resume=run"],
            cwd=cli.folder,
            env=cli.environment,
            capture_output=True,
            text=True,
            preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)),
        )
        assert done.returncode == 74, done.stderr
        assert_reported(done.stderr, run / "checkpoints", space=True)
        assert "ulimit -f" in done.stderr
        found = newest_checkpoint(run)
        assert found.checkpoint.step == 2
        assert_same_state(found, whole, but=("hyperparameters",))
        cli("resume=run")
        assert_ended_equal(whole, run)
        cases.done()


class SmallDisk:
    """A tmpfs of 400 kB in a mount namespace of its own, which a sleeping process keeps alive."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.place = place
        mount = f"mount -t tmpfs -o size=400k tmpfs {shlex.quote(str(place))} && echo mounted && exec sleep 600"
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--map-root-user", "--user", "sh", "-c", mount], stdout=subprocess.PIPE, text=True
        )
        if self.holder.stdout.readline() != "mounted\n":
            pytest.skip("no small disk can be mounted here")
        self.visible = Path(f"/proc/{self.holder.pid}/root{place}")
        """The path of the same folder from outside the namespace."""

    def start(self, cli, *overrides, env=None):
        """Start the program inside the namespace."""
        command = f"cd {shlex.quote(str(cli.folder))} && exec {sys.executable} -m runner {shlex.join(overrides)}"
        return subprocess.Popen(
            [
                "nsenter",
                f"--target={self.holder.pid}",
                "--user",
                "--mount",
                "--preserve-credentials",
                "sh",
                "-c",
                command,
            ],
            env={**cli.environment, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def fill(self, leave):
        """Fill the disk up to `leave` bytes."""
        with (self.visible / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
            filler.truncate(max(0, filler.tell() - leave))

    def free_space(self):
        (self.visible / "filler").unlink()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.holder.kill()
        self.holder.communicate()


def wait_until_stopped(process):
    while process.poll() is None:
        if Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.005)
    raise AssertionError(process.communicate()[0])


SAVE = "checkpoints/.tmp-step-0000004"
# The call at which the disk fills up (the program stops itself there until it has), and the bytes that are left then.
# A row may be written during a save, so that either of them may find the disk full.
FULL = [
    (SAVE, "open", 0, 0),  # no space for the adapters
    (SAVE, "open", 1, 0),  # for the adapter's config
    (SAVE, "open", 2, 0),  # for the optimizer
    (SAVE, "open", 2, 8192),  # for more than half of it
    (SAVE, "open", 3, 0),  # for the state
    (SAVE, "open", 4, 0),  # for the manifest
    ("metrics.jsonl", "write", 2, 16384),  # for a whole save: it is not begun
    (".status.json.", "write", 4, 0),  # for the status
]


@pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("unshare") and shutil.which("nsenter")),
    reason="mounts a tmpfs in a namespace of its own",
)
@pytest.mark.parametrize("chunk", range(2))
def test_a_full_disk_exits_with_74_and_the_run_resumes_equal_once_there_is_space(
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
    whole, _ = run_with_calls(*overrides, KEEP_ALL)
    for number, (name, call, at, leave) in enumerate(cases.some(FULL, quick=2)[chunk::2]):
        cli = make_cli(tmp_path.resolve() / f"{number}")
        with SmallDisk(cli.folder / "disk") as disk:
            run, visible = disk.place / "run", disk.visible / "run"
            fault = fault_environment(run, name=name, calls=call, at=at, do=f"+{signal.SIGSTOP:d}")
            process = disk.start(cli, *overrides, KEEP_ALL, f"hydra.run.dir={run}", env=fault)
            wait_until_stopped(process)
            disk.fill(leave)
            os.kill(process.pid, signal.SIGCONT)
            out, _ = process.communicate(timeout=120)
            assert process.returncode == 74, out
            # Training continues during a save: a row or the status may be the first to find the disk full.
            assert_reported(out, run, space=True)
            found = newest_checkpoint(visible)
            assert found.checkpoint.step in ((2,) if name == SAVE else (2, 4))
            assert_same_state(found, whole)
            disk.free_space()
            process = disk.start(cli, f"resume={run}")
            out, _ = process.communicate(timeout=120)
            assert process.returncode == 0, out
            assert_ended_equal(whole, visible)
        cases.done()
