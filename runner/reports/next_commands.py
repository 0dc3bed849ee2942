"""How to go on with a run: the commands to copy, by the state that it is in."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from runner.common.text import relative_path
from runner.reports.checkpoint_list import CheckpointInfo
from runner.runs.inspect import RunInfo, SweepInfo

_PROGRAM = "python -m runner"
_MOST_NAMED = 5


@dataclass(frozen=True)
class Command:
    """What it does, and the words to type."""

    what: str
    words: str


def for_run(run: RunInfo, checkpoints: list[CheckpointInfo], has_result: bool) -> list[Command]:
    """The commands that make sense for a run as it stands; none that its directory could not answer."""
    path = quoted(run.path)
    sound = [one for one in checkpoints if one.problem is None]
    said: list[Command] = []
    if run.state == "running":
        pid = run.status.get("pid")
        if type(pid) is int and pid > 1:
            said.append(Command(f"stop it (it saves first), on {run.status.get('host', 'its host')}", f"kill {pid}"))
    elif run.settings and run.state in ("stopped", "interrupted", "failed"):
        said.append(Command("go on", f"{_PROGRAM} resume={path}"))
    elif run.settings and run.state == "finished" and _may_extend(run) and run.iters and sound:
        said.append(Command("train longer", f"{_PROGRAM} resume={path} train.iters={2 * run.iters}"))
    if run.settings:
        said += _gentler(run, sound) if run.state == "diverged" else [_variation(run)]
        # A branch from the end of a finished run would have nothing to do.
        points = sound[:-1] if run.state == "finished" else sound
        if points and run.state not in ("running", "diverged"):
            said.append(Command("branch off", f"{_PROGRAM} resume={quoted(points[-1].path)}"))
    if has_result:
        adapters = quoted(run.path / "adapters")
        if run.settings:  # repeat= brings the base that the adapter fits
            said.append(Command("build on it", f"{_PROGRAM} repeat={path} adapter={adapters}"))
        said.append(Command("ask it", f"{_PROGRAM} generate {path} '…'"))
        model = run.settings.get("model.path")
        if isinstance(model, str) and not model.startswith("builtin:") and not model.endswith(".gguf"):
            words = f"mlx_lm.generate --model {shlex.quote(model)} --adapter-path {adapters} --prompt '…'"
            said.append(Command("elsewhere", words))
    return said


def for_sweep(sweep: SweepInfo) -> list[Command]:
    """The commands that make sense for a sweep: finish what is unfinished, look at the best, vary it."""
    said: list[Command] = []
    unfinished = [run for run in sweep.runs if run.state in ("stopped", "interrupted", "failed") and run.settings]
    if (unfinished or sweep.waiting) and (sweep.path / "sweep.jsonl").is_file():
        said.append(Command("finish it", f"{_PROGRAM} resume={quoted(sweep.path)}"))
    else:
        said += [
            Command(f"go on with {run.path.name}", f"{_PROGRAM} resume={quoted(run.path)}")
            for run in unfinished[:_MOST_NAMED]
        ]
    best = sweep.best
    if best is not None and best.settings:
        said.append(Command("see the best", f"{_PROGRAM} show {quoted(best.path)}"))
        said.append(Command("vary the best", f"{_PROGRAM} repeat={quoted(best.path)} seed=1"))
        if (best.path / "adapters").is_dir():
            adapters = quoted(best.path / "adapters")
            said.append(Command("build on it", f"{_PROGRAM} repeat={quoted(best.path)} adapter={adapters}"))
    return said


def _gentler(run: RunInfo, sound: list[CheckpointInfo]) -> list[Command]:
    """A run that diverged, again with half its learning rate: from the beginning, and from its last sound weights."""
    rate = run.settings.get("optimizer.learning_rate")
    if not isinstance(rate, (int, float)) or isinstance(rate, bool):
        return []
    words = f"{_PROGRAM} repeat={quoted(run.path)} optimizer.learning_rate={rate / 2:g}"
    said = [Command("again, gentler", words)]
    if sound:
        said.append(Command("from its weights", f"{words} adapter={quoted(sound[-1].path)}"))
    return said


def _variation(run: RunInfo) -> Command:
    rank = run.settings.get("lora.rank")
    rank = 2 * rank if type(rank) is int else 16
    return Command("vary it", f"{_PROGRAM} repeat={quoted(run.path)} lora.rank={rank}")


def quoted(path: Path) -> str:
    """A path as one types it here, quoted for the shell where it has to be."""
    return shlex.quote(relative_path(path))


def _may_extend(run: RunInfo) -> bool:
    return run.settings.get("schedule.name") == "constant" or run.settings.get("schedule.iters") is not None
