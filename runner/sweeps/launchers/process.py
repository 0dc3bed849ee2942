"""hydra/launcher=process: each job is a process of its own, a plain run in its folder; several at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig
from rich.console import Console
from rich.live import Live
from rich.text import Text

from runner.app.resolve import resolve_config
from runner.backends.cpu.blas import thread_count
from runner.common.cores import usable_cores
from runner.common.errors import ConfigError, RunnerError
from runner.config.invocation import Invocation
from runner.config.quoting import quote_path
from runner.runs.directory import RunDirectory
from runner.sweeps.compose import JobComposer
from runner.sweeps.job import differing_overrides, split_overrides
from runner.training.signals import StopSignals

_POLL_SECONDS = 0.2
_SHOW_SECONDS = 1.0
_SHARE_OF_MEMORY = 0.8
_LEAST_BYTES = 700_000_000
"""A process with MLX and transformers loaded, before any model."""


@dataclass
class Running:
    """A job in its process."""

    number: int
    index: int
    overrides: list[str]
    label: str
    folder: Path
    process: subprocess.Popen[bytes]
    log: IO[bytes]


@dataclass
class Queue:
    """What is waiting, running and done."""

    waiting: list[int]
    running: list[Running] = field(default_factory=list)
    done: dict[int, JobReturn] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)


def launch(
    jobs: Sequence[Sequence[str]],
    *,
    at_once: int | None,
    context: HydraContext,
    config: DictConfig,
    invocation: Invocation,
) -> list[JobReturn]:
    """Run `jobs`, `at_once` at a time (None: as many as fit memory and cores), sharing the cores' BLAS threads out.

    A job that is killed or runs out of memory counts as failed; the others go on.

    Raises:
        SystemExit: a signal was asked for; every running job was asked too, and has saved.
    """
    if at_once is not None and (not isinstance(at_once, int) or at_once < 1):
        raise ConfigError(f"hydra.launcher.jobs={at_once} cannot be: it has to be 1 or more, or null.")
    sweep = Path(config.hydra.sweep.dir)
    composer = JobComposer(context.config_loader, config)
    split = [split_overrides(words) for words in jobs]
    number_at_once = at_once or _fitting(composer, [overrides for overrides, _ in split])
    number_at_once = max(1, min(number_at_once, len(jobs)))
    threads = max(1, thread_count(number_at_once, usable_cores()))
    labels = differing_overrides([overrides for overrides, _ in split])
    logs = sweep / "logs"
    logs.mkdir(exist_ok=True)
    queue = Queue(list(range(len(jobs))))
    print(f"processes: {number_at_once} at once, {threads} BLAS threads each; output in {logs}", flush=True)
    with StopSignals() as stops, ExitStack() as stack:
        console = Console(highlight=False, soft_wrap=True)
        live = (
            stack.enter_context(Live(console=console, transient=True, refresh_per_second=2))
            if (console.is_terminal)
            else None
        )
        shown = 0.0
        while queue.waiting or queue.running:
            while queue.waiting and len(queue.running) < number_at_once and stops.signal is None:
                index = queue.waiting.pop(0)
                overrides, own = split[index]
                queue.running.append(_begin(index, overrides, own, labels[index], sweep, logs, threads, invocation))
            if stops.signal is not None:
                queue.waiting.clear()
                _ask(queue.running, stops.signal)
            for one in [r for r in queue.running if r.process.poll() is not None]:
                queue.running.remove(one)
                queue.done[one.index] = _ended(one)
                (live.console if live else console).print(_line(one, ended=True), markup=False)
            if live is not None and time.monotonic() - shown > _SHOW_SECONDS:
                live.update(Text("\n".join(_line(one) for one in queue.running)))
                shown = time.monotonic()
            time.sleep(_POLL_SECONDS)
        if stops.signal is not None:
            raise SystemExit(128 + stops.signal)
    return [queue.done[i] for i in range(len(jobs))]


def _begin(
    index: int,
    overrides: list[str],
    own: dict[str, str],
    label: str,
    sweep: Path,
    logs: Path,
    threads: int,
    invocation: Invocation,
) -> Running:
    number = int(own["hydra.sweep.subdir"])
    folder = sweep / str(number)
    if own.get("hydra.output_subdir") == "null":  # its run began: it goes on
        words = [f"resume={quote_path(str(folder))}"]
        words += [word for word in overrides if word.startswith("model.trust_remote_code=")]
    else:
        # A recipe that is a sweep says so in each of its jobs too.
        words = [word for word in overrides if not word.startswith("stored=")]
        words += ["hydra.mode=RUN", f"hydra.run.dir={quote_path(str(folder))}"]
        if invocation.repeat is not None:
            words.append(f"repeat={quote_path(str(invocation.repeat))}")
    if invocation.stop_at is not None:
        words.append(f"train.stop_at={invocation.stop_at}")
    flags = [word for word in invocation.flags if word.startswith("--config-dir=")]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads), "RUNNER_IN_SWEEP": "1"}
    log = (logs / f"{number}.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", "runner", *flags, *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # Ctrl-C comes to us alone; we ask each job once
    )
    return Running(number, index, overrides, label, folder, process, log)


def _ask(running: list[Running], number: signal.Signals) -> None:
    for one in running:
        if one.process.poll() is None and not one.log.closed:
            one.process.send_signal(number)
            one.log.close()  # also the mark that it was asked: a second signal would end it without saving


def _ended(one: Running) -> JobReturn:
    one.log.close()
    code = one.process.returncode
    done = JobReturn()
    done.overrides = one.overrides
    if code == 0:
        done.status, done.return_value = JobStatus.COMPLETED, None
        return done
    status = RunDirectory(one.folder).read_status()
    reason = status.get("reason")
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        if status.get("state") == "interrupted":
            # Nobody else will: the process is gone, and its status still says running.
            RunDirectory(one.folder).write_status({**status, "state": "interrupted", "reason": reason})
    done.status = JobStatus.FAILED
    done.return_value = RunnerError(f"job {one.number}: {reason or f'exit code {code}'}")
    return done


def _fitting(composer: JobComposer, jobs: list[list[str]]) -> int:
    """As many as the cores, and as many as memory holds by the sizes of their base models in float32."""
    sizes = {_weights_bytes(resolve_config(composer.compose(overrides)).model.path) for overrides in jobs}
    each = _LEAST_BYTES + 3 * max(sizes, default=0)
    return max(1, min(usable_cores(), int(_SHARE_OF_MEMORY * available_bytes() / each)))


def _weights_bytes(path: str) -> int:
    """Bytes of a local model's weights in memory, roughly: a .gguf of 4 to 8 bits is expanded to 32."""
    found = Path(path)
    if path.startswith("builtin:"):
        return 0 if path == "builtin:tiny" else 540_000_000
    if found.is_file():
        return 6 * found.stat().st_size
    if found.is_dir():
        return 2 * sum(file.stat().st_size for file in found.glob("model*.safetensors"))
    return 2_000_000_000  # on the hub: not known before it is fetched


def available_bytes() -> int:
    """Memory that is free to use now, in bytes; half of all of it where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _line(one: Running, ended: bool = False) -> str:
    """One line a job: number, overrides, step, losses, state."""
    status = RunDirectory(one.folder).read_status()
    step = f"{status.get('step', 0)}/{status.get('iters', '?')}"
    parts = [f"job {one.number:<3} {step:>11}"]
    for name, label in (("train_loss", "train"), ("valid_loss", "valid")):
        if isinstance(status.get(name), float):
            parts.append(f"{label} {status[name]:.4f}")
    if ended:
        code = one.process.returncode
        reason = str(status.get("reason") or "").split("\n")[0]
        parts.append(str(status.get("state")) if code == 0 else f"{status.get('state')} ({reason or f'exit {code}'})")
    return "  ".join([*parts, one.label])
