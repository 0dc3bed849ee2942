"""`runner verify`: is every byte still what was saved? Checkpoints, runs, sweeps and whole trees, without a model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runner.checkpoints import mirror
from runner.checkpoints.verify import STEP_NAME
from runner.cli.commands import COMMANDS, CommandParser
from runner.cli.commands.ls import DEFAULT
from runner.common.errors import EXIT_DAMAGED, EXIT_DONE, ConfigError, did_you_mean
from runner.common.text import format_bytes, relative_path
from runner.reports import audit
from runner.reports.audit import Audit
from runner.reports.next_commands import for_damaged_run
from runner.reports.screen import Screen, json_document
from runner.runs.find import SweepInfo, find_runs, looks_like_run
from runner.runs.inspect import RunInfo, read_run

if TYPE_CHECKING:
    from runner.cli.commands.replay import Replay


def run(argv: list[str]) -> int:
    """Verify what `argv` names; 0 where all is whole, 5 where something is damaged or cannot be reproduced.

    Raises:
        ConfigError: a word that is not understood, or nothing to verify at a path.
    """
    parser = CommandParser(prog="runner verify", description=COMMANDS["verify"])
    parser.add_argument(
        "paths", metavar="PATH", nargs="*", help=f"checkpoints, runs, sweeps, folders (default: {DEFAULT})"
    )
    parser.add_argument(
        "--replay",
        action="store_true",
        help="train a run again from one kept checkpoint to the next, aside, and compare the two bit for bit",
    )
    parser.add_argument(
        "--from", dest="start", type=int, metavar="STEP", help="of --replay: the checkpoint to begin at"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    words = parser.parse_args(argv)
    if words.start is not None and not words.replay:
        raise ConfigError("--from STEP belongs to --replay.")
    paths = [Path(path).expanduser() for path in words.paths or [DEFAULT]]
    screen, begun = Screen(), time.monotonic()
    audits = []
    for path in paths:
        for one in _audits(path):
            audits.append(one)
            if not words.json:
                _show(screen, one)
    replays: list[Replay] = []
    if words.replay and not any(one.damage for one in audits):
        replays = _replay(audits, words.start, screen if not words.json else None)
    damaged = sum(bool(one.damage) for one in audits)
    if words.json:
        print(
            json_document(
                {
                    "audits": [vars(one) for one in audits],
                    "damaged": damaged,
                    "replays": [one.to_dict() for one in replays],
                }
            )
        )
    else:
        _sum_up(screen, audits, damaged, time.monotonic() - begun)
    same = all(one.reproduced for one in replays)
    return EXIT_DONE if not damaged and same else EXIT_DAMAGED


def _audits(path: Path) -> Iterator[Audit]:
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: there is no such folder.{did_you_mean(path.name, near)}")
    if not path.is_dir():
        raise ConfigError(f"{path}: a file; name a checkpoint (step-0000100), a run, a sweep or a folder above them.")
    if STEP_NAME.fullmatch(path.name):
        yield audit.of_checkpoint(path)
        return
    if path.name == "adapters" and not looks_like_run(p.name for p in path.iterdir()):
        yield audit.of_result(path)
        return
    if (path / "config.yaml").is_file() or mirror.is_backup(path):  # also where it is the only file left
        yield audit.of_run(read_run(path))
        return
    found = find_runs(path)
    if not found:
        raise ConfigError(f"{path}: no checkpoint, run or sweep is there or below.")
    for one in reversed(found):
        if isinstance(one, RunInfo):
            yield audit.of_run(one)
            continue
        yield from _sweep(one)


def _sweep(sweep: SweepInfo) -> Iterator[Audit]:
    damage = [sweep.problem] if sweep.problem else []
    yield Audit(sweep.path, "sweep", damage=damage)
    for one in sweep.runs:
        yield audit.of_run(one)


def _show(screen: Screen, one: Audit) -> None:
    if one.kind == "sweep" and not one.damage:
        return
    about = f"{one.kind} {one.state}".strip()
    if one.kind in ("run", "backup"):
        about += f", {_number(one.checkpoints, 'checkpoint')}, {format_bytes(one.size_bytes)}"
    verdict, style = ("DAMAGED", "red") if one.damage else ("whole", "green")
    screen.line((f"{verdict:<9}", style), (f"{relative_path(one.path)}  ({about})", ""))
    for line in one.damage:
        screen.line((f"  {line}", "red"))
    for line in one.notes:
        screen.line((f"  {line}", "dim"))
    for line in _recovery(one):
        screen.line((f"  {line}", ""))


def _recovery(one: Audit) -> list[str]:
    """Return what is left of a damaged run, and the commands that recover it."""
    if not one.damage or one.kind not in ("run", "backup"):
        return []
    lines = []
    if one.whole:
        best = f"; best of them {one.best}" if one.best is not None else ""
        lines.append(f"whole: step {', '.join(str(step) for step in one.whole)}{best}")
    is_backup = one.kind == "backup"
    commands = for_damaged_run(one.path, resumable=bool(one.whole), backup=one.backup, is_backup=is_backup)
    return [*lines, *(f"{command.purpose}: {command.line}" for command in commands)]


def _sum_up(screen: Screen, audits: list[Audit], damaged: int, seconds: float) -> None:
    runs = sum(one.kind in ("run", "backup") for one in audits)
    checkpoints = sum(one.checkpoints for one in audits)
    size = format_bytes(sum(one.size_bytes for one in audits))
    verdict = f"{damaged} damaged" if damaged else "all whole"
    counted = f"{_number(runs, 'run')}, {_number(checkpoints, 'checkpoint')}, {size} read in {seconds:.1f} s"
    screen.line((f"{counted}: {verdict}", "red" if damaged else "green"))


def _replay(audits: list[Audit], start: int | None, screen: Screen | None) -> list[Replay]:
    from runner.cli.commands import replay

    runs = [one for one in audits if one.kind in ("run", "backup")]
    if not runs:
        raise ConfigError("--replay takes run directories: it needs their settings and checkpoints.")
    made = []
    for one in runs:
        found = replay.replay(one.path, one.whole, start)
        made.append(found)
        if screen:
            style = "green" if found.reproduced else "red"
            screen.line((f"{relative_path(one.path)}: {found.message}", style))
    return made


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
