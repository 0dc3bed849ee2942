"""`runner verify`: check that every byte is still what was saved, in checkpoints, runs, sweeps and folders of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from runner.checkpoints import mirror
from runner.cli.commands import COMMANDS, CommandParser
from runner.cli.run_argument import OUTPUTS, resolve_name
from runner.common.errors import EXIT_DAMAGED, EXIT_DONE, ConfigError, did_you_mean
from runner.common.layout import STEP_NAME
from runner.common.text import format_bytes, relative_path
from runner.reports.audit import Audit, audit_checkpoint, audit_result, audit_run
from runner.reports.next_commands import for_damaged_run
from runner.reports.screen import Screen, json_document
from runner.runs.find import find_runs, looks_like_run
from runner.runs.inspect import RunInfo, read_run

if TYPE_CHECKING:
    from runner.cli.commands.replay import Replay


def run(argv: list[str]) -> int:
    """Verify what `argv` names; return 0 if all of it is intact, 5 if something is damaged or not reproduced.

    Raises:
        ConfigError: a wrong argument, or a path with nothing to verify.
    """
    parser = CommandParser(prog="runner verify", description=COMMANDS["verify"])
    parser.add_argument(
        "paths", metavar="PATH", nargs="*", help=f"checkpoints, runs, sweeps, folders (default: {OUTPUTS})"
    )
    parser.add_argument(
        "--replay",
        action="store_true",
        help="also train each run again from one checkpoint to the next, in a scratch folder, and compare bit for bit",
    )
    parser.add_argument(
        "--from", dest="start", type=int, metavar="STEP", help="with --replay: the checkpoint to start at"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_args(argv)
    if options.start is not None and not options.replay:
        raise ConfigError("--from STEP belongs to --replay.")
    screen, started = None if options.json else Screen(), time.monotonic()
    audits = []
    for path in options.paths or [OUTPUTS]:
        for audited in _audits(resolve_name(path)):
            audits.append(audited)
            if screen:
                _print_audit(screen, audited)
    damaged = sum(bool(audited.damage) for audited in audits)
    replays = _replay(audits, options.start, screen) if options.replay and not damaged else []
    if screen:
        _print_total(screen, audits, damaged, time.monotonic() - started)
    else:
        entries = {"audits": [vars(audited) for audited in audits], "damaged": damaged}
        print(json_document({**entries, "replays": [replay.to_dict() for replay in replays]}))
    is_intact = not damaged and all(replay.reproduced for replay in replays)
    return EXIT_DONE if is_intact else EXIT_DAMAGED


def _audits(path: Path) -> Iterator[Audit]:
    """Audit the checkpoint, result, run or backup at `path`, or all runs and sweeps below it."""
    if not path.exists():
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: there is no such folder.{did_you_mean(path.name, names)}")
    if not path.is_dir():
        raise ConfigError(f"{path}: a file; name a checkpoint (step-0000100), a run, a sweep or a folder above them.")
    if STEP_NAME.fullmatch(path.name):
        yield audit_checkpoint(path)
    elif path.name == "adapters" and not looks_like_run(p.name for p in path.iterdir()):
        yield audit_result(path)
    elif (path / "config.yaml").is_file() or mirror.is_backup(path):  # also if config.yaml is all that is left
        yield audit_run(read_run(path))
    else:
        found = find_runs(path)
        if not found:
            raise ConfigError(f"{path}: no checkpoint, run or sweep is there or below.")
        for info in reversed(found):
            if isinstance(info, RunInfo):
                yield audit_run(info)
            else:
                yield Audit(info.path, "sweep", damage=[info.problem] if info.problem else [])
                yield from map(audit_run, info.runs)


def _print_audit(screen: Screen, audited: Audit) -> None:
    if audited.kind == "sweep" and not audited.damage:
        return
    content = f"{audited.kind} {audited.state}".strip()
    if audited.kind in ("run", "backup"):
        content += f", {_count(audited.checkpoints, 'checkpoint')}, {format_bytes(audited.size_bytes)}"
    verdict, style = ("DAMAGED", "red") if audited.damage else ("whole", "green")
    screen.line((f"{verdict:<9}", style), (f"{relative_path(audited.path)}  ({content})", ""))
    for lines, style in ((audited.damage, "red"), (audited.notes, "dim"), (_recovery(audited), "")):
        for line in lines:
            screen.line((f"  {line}", style))


def _recovery(audited: Audit) -> list[str]:
    """Return what is left of a damaged run, and the commands that recover it."""
    if not audited.damage or audited.kind not in ("run", "backup"):
        return []
    lines = []
    if audited.whole:
        best = f"; best of them {audited.best}" if audited.best is not None else ""
        lines.append(f"whole: step {', '.join(str(step) for step in audited.whole)}{best}")
    commands = for_damaged_run(
        audited.path,
        resumable=bool(audited.whole) and audited.has_settings,
        repeatable=audited.has_settings and audited.kind == "run",
        backup=audited.backup,
    )
    return [*lines, *(f"{command.purpose}: {command.line}" for command in commands)]


def _replay(audits: list[Audit], start: int | None, screen: Screen | None) -> list[Replay]:
    from runner.cli.commands.replay import replay

    runs = [audited for audited in audits if audited.kind in ("run", "backup")]
    if not runs:
        raise ConfigError("--replay needs run directories: it uses their settings and checkpoints.")
    replays = []
    for audited in runs:
        replays.append(replay(audited.path, audited.whole, start))
        if screen:
            style = "green" if replays[-1].reproduced else "red"
            screen.line((f"{relative_path(audited.path)}: {replays[-1].message}", style))
    return replays


def _print_total(screen: Screen, audits: list[Audit], damaged: int, seconds: float) -> None:
    runs = sum(audited.kind in ("run", "backup") for audited in audits)
    checkpoints = sum(audited.checkpoints for audited in audits)
    size = format_bytes(sum(audited.size_bytes for audited in audits))
    verdict = f"{damaged} damaged" if damaged else "all whole"
    counts = f"{_count(runs, 'run')}, {_count(checkpoints, 'checkpoint')}, {size} read in {seconds:.1f} s"
    screen.line((f"{counts}: {verdict}", "red" if damaged else "green"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
