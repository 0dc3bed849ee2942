"""The commands to type next for a run or a sweep: at the end of a run, in `show`, in `verify` and after a sweep."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.common.commands import PROGRAM, mlx_lm_command, repeat_command, resume_command, warm_start_command
from runner.common.safe_json import finite_number
from runner.common.text import relative_path, shell_path
from runner.common.units import SECONDS, parse_quantity
from runner.config.resume_policy import iters_may_change
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo
from runner.runs.sweep_manifest import NAME as SWEEP_MANIFEST

if TYPE_CHECKING:
    from runner.reports.checkpoint_list import CheckpointInfo  # which imports NumPy
    from runner.reports.search_summary import SearchSummary

_MOST_RUNS = 5
"""Unfinished runs of a sweep without a manifest that are listed one by one."""
_MAX_CONFIG_BYTES = 1 << 20
_UNFINISHED = ("stopped", "interrupted", "failed")


@dataclass(frozen=True)
class Command:
    """A shell command and what it does."""

    purpose: str
    line: str


def after_run(run: RunInfo, *, has_result: bool) -> list[Command]:
    """Return the few commands printed where a run ends; `for_run` has all of them."""
    commands = [_resume(run.path)] if run.state == "stopped" else [_vary(run)]
    if has_result:
        commands += [_warm_start(run)] if run.state != "stopped" else []
        commands += _use_with_mlx_lm(run)
    return commands


def for_run(run: RunInfo, checkpoints: Sequence[CheckpointInfo], *, has_result: bool) -> list[Command]:
    """Return the commands that make sense in the run's state and that its directory allows."""
    commands = []
    valid = [checkpoint for checkpoint in checkpoints if checkpoint.problem is None]
    if run.state == "running":
        pid = run.status.get("pid")
        if type(pid) is int and pid > 1:
            host = run.status.get("host", "its host")
            commands.append(Command(f"stop (it saves first), on {host}", f"kill {pid}"))
    elif run.settings and run.state in _UNFINISHED:
        commands.append(_resume(run.path))
    elif run.settings and run.state == "finished" and iters_may_change(run.settings) and run.iters and valid:
        commands.append(Command("train longer", f"{_resume(run.path).line} train.iters={2 * run.iters}"))
    if run.settings:
        commands += _slower(run, valid) if run.state == "diverged" else [_vary(run)]
        # A branch from the last step of a finished run has nothing left to train.
        branch_points = valid[:-1] if run.state == "finished" else valid
        if branch_points and run.state not in ("running", "diverged"):
            commands.append(Command("branch", _resume(branch_points[-1].path).line))
    if has_result:
        if run.settings:  # repeat= selects the base model that the adapter fits
            commands.append(_warm_start(run))
        commands += _use(run)
    return commands


def for_sweep(sweep: SweepInfo, search: SearchSummary | None = None) -> list[Command]:
    """Return the commands that finish a sweep, show its best run and vary it.

    `search` is what it did where it is a search.
    """
    if search is not None:
        return _for_search(sweep.path, search, sweep.best)
    commands = []
    unfinished = [run for run in sweep.runs if run.state in _UNFINISHED and run.settings]
    if (unfinished or sweep.waiting) and (sweep.path / SWEEP_MANIFEST).is_file():
        commands.append(_resume(sweep.path, "finish the sweep"))
    else:
        commands += [_resume(run.path, f"resume job {run.path.name}") for run in unfinished[:_MOST_RUNS]]
    best = sweep.best
    if best is not None and best.settings:
        commands += [_show(best), Command("vary the best", repeat_command(best.path, "seed=1"))]
        if (best.path / "adapters").is_dir():
            commands.append(_warm_start(best))
    return commands


def after_search(folder: Path, search: SearchSummary, best: RunInfo | None) -> list[Command]:
    """Return the commands printed where a search ends: finish it, or show its best run and search on."""
    if not search.is_complete:
        return [_finish_search(folder, search, "finish")]
    shown = [] if best is None else [_show(best), *_train_longer(best)]
    return [*shown, *_search_on(folder, search)]


def _for_search(folder: Path, search: SearchSummary, best: RunInfo | None) -> list[Command]:
    commands = [] if search.is_complete else [_finish_search(folder, search, "finish the search")]
    if best is not None and best.settings:
        commands.append(_show(best))
        if best.state == "finished":
            commands += _train_longer(best)
            commands.append(Command("train the best on more data", repeat_command(best.path, "data.path=…")))
        if (best.path / "adapters").is_dir():
            commands.append(_warm_start(best))
    return commands + (_search_on(folder, search) if search.is_complete else [])


def _finish_search(folder: Path, search: SearchSummary, purpose: str) -> Command:
    """Return the command that finishes a search; with more time where its budget was too short for one trial."""
    budget = _more_time(search.options.get("budget"), search.record.spent_seconds) if search.record.missed else ""
    more = f" hydra.sweeper.budget={budget}" if budget else ""
    return Command(purpose, f"{_resume(folder).line}{more}")


def _search_on(folder: Path, search: SearchSummary) -> list[Command]:
    """Return the commands that give a complete search more trials, more time, or more seeds."""
    options, record, resume = search.options, search.record, _resume(folder).line
    budget = _more_time(options.get("budget"), record.spent_seconds)
    time = f" hydra.sweeper.budget={budget}" if budget else ""
    wanted, made = options.get("trials"), sum(trial.state != "repeats" for trial in search.trials)
    more = f" hydra.sweeper.trials={2 * made}"
    if budget and (record.missed or (isinstance(wanted, int) and wanted > made)):  # time was what it lacked
        more = ""
    commands = [] if search.only_repeats else [Command("search on", f"{resume}{more}{time}")]
    if options.get("seeds") in (None, 1):
        commands.append(Command("compare finalists over seeds", f"{resume} hydra.sweeper.seeds=3{time}"))
    return commands


def _train_longer(best: RunInfo) -> list[Command]:
    if not best.iters:
        return []
    return [Command("train the best longer", repeat_command(best.path, f"train.iters={2 * best.iters}"))]


def _more_time(budget: object, spent: float) -> str:
    """Return twice a budget, or twice what was spent where that is more, in its unit: `8h` as `16h`; empty for none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]+)", str(budget), re.IGNORECASE)
    unit = parse_quantity(f"1{match[2]}", SECONDS) if match else None
    if match is None or unit is None:
        return ""
    return f"{max(2 * float(match[1]), math.ceil(2 * spent / unit)):g}{match[2]}"


def _show(run: RunInfo) -> Command:
    return Command("show the best", f"{PROGRAM} show {shell_path(run.path)}")


def after_sweep(folder: Path, *, finished: bool, varied: Sequence[str]) -> list[Command]:
    """Return the command printed where a sweep ends: finish it, or extend it by values of the first `varied` key."""
    if not finished:
        return [_resume(folder, "finish")]
    return [Command("extend", f"{_resume(folder).line} {varied[0]}=…")] if varied else []


def for_damaged_run(run: Path, *, resumable: bool, repeatable: bool, backup: Path | None) -> list[Command]:
    """Return the ways to recover a run: its newest valid checkpoint, its backup, or else its settings alone."""
    commands = []
    if resumable:
        commands.append(_resume(run, "resume from the newest valid checkpoint"))
    if backup is not None:
        commands.append(Command("verify its backup", f"{PROGRAM} verify {shell_path(backup)}"))
    if not commands and repeatable:
        commands.append(Command("train again with its settings", repeat_command(run)))
    return commands


def command_lines(commands: Sequence[Command]) -> list[str]:
    """Return a line for each command, its purpose in front, aligned with the lines of a summary."""
    width = max([11, *(len(command.purpose) for command in commands)])
    return [f"{command.purpose:<{width}} {command.line}" for command in commands]


def command_fields(commands: Sequence[Command]) -> list[dict[str, str]]:
    """Return the commands for a JSON document."""
    return [{"what": command.purpose, "words": command.line} for command in commands]


def _resume(path: Path, purpose: str = "resume") -> Command:
    return Command(purpose, resume_command(path))


def _vary(run: RunInfo) -> Command:
    rank = run.settings.get("lora.rank")
    return Command("vary", repeat_command(run.path, f"lora.rank={2 * rank if type(rank) is int else 16}"))


def _warm_start(run: RunInfo) -> Command:
    return Command("warm start", warm_start_command(run.path, run.path / "adapters"))


def _use(run: RunInfo) -> list[Command]:
    """Return the commands that use the result: with one prompt, in a conversation, by HTTP, and in other programs."""
    path = shell_path(run.path)
    others = _use_with_mlx_lm(run)
    commands = [Command("generate", f"{PROGRAM} generate {path} '…'")]
    commands += [Command(verb, f"{PROGRAM} {verb} {path}") for verb in ("chat", "serve")]
    fuses = any(" export " in command.line for command in others)
    return [*commands, *others, *([] if fuses else [Command("export", f"{PROGRAM} export {path} --to fused")])]


def _use_with_mlx_lm(run: RunInfo) -> list[Command]:
    """Return the command that loads the run's adapter into stock mlx-lm, where mlx-lm can load the base model."""
    model = run.settings.get("model.path")
    if not isinstance(model, str) or model.startswith("builtin:") or model.endswith(".gguf") or "${" in model:
        return []
    if _is_in_transformers5_format(Path(model) / "config.json"):  # stock mlx-lm may compute another model from it
        return [Command("use with mlx-lm", f"{PROGRAM} export {shell_path(run.path)} --to fused")]
    template_args = run.settings.get("data.template_args")
    line = mlx_lm_command(
        model,
        relative_path(run.path / "adapters"),
        chat_template=run.settings.get("data.chat_template") is not False,
        template_args=template_args if isinstance(template_args, dict) else None,
    )
    return [Command("use with mlx-lm", line)]


def _is_in_transformers5_format(config: Path) -> bool:
    try:
        with config.open("rb") as file:
            return b'"rope_parameters"' in file.read(_MAX_CONFIG_BYTES)
    except OSError:
        return False


def _slower(run: RunInfo, valid: Sequence[CheckpointInfo]) -> list[Command]:
    """Return the commands that repeat a diverged run at half its learning rate, from its start and its last weights."""
    rate = finite_number(run.settings.get("optimizer.learning_rate"))
    if rate is None:
        return []
    line = repeat_command(run.path, f"optimizer.learning_rate={rate / 2:g}")
    commands = [Command("lower the learning rate", line)]
    if valid:
        adapter = shell_path(valid[-1].path)
        commands.append(Command("the same from its last weights", f"{line} adapter={adapter}"))
    return commands
