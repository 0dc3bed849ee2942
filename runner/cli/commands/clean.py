"""`runner clean`: show what runs no longer need and how much disk it takes, and remove it once that is confirmed."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.cleaning import caches, facts, remove
from runner.cleaning.caches import CacheEntry
from runner.cleaning.facts import Context
from runner.cleaning.policy import Kept, Policies, Removal, decide
from runner.cleaning.remove import NotRemoved
from runner.cli.commands.selection import Selection, SelectionParser, select
from runner.cli.run_argument import OUTPUTS
from runner.common.cache_dir import cache_dir
from runner.common.errors import EXIT_DONE, ConfigError
from runner.common.text import count, format_bytes, relative_path, shorten
from runner.common.units import BYTES, SECONDS, parse_quantity
from runner.reports.screen import Screen, json_document
from runner.reports.tables import Column, TableRow
from runner.runs.directory import RunDirectory
from runner.runs.find import find_runs, is_run_or_sweep
from runner.runs.inspect import RunInfo, folder_size

_EXAMPLES = """\
Of a run that stays, the best and the newest checkpoint stay, and those that its result or another run came from. Runs
in use, and files that no run writes, are left alone. Without --yes nothing is removed.

examples:
  runner clean --checkpoints                        what the checkpoints of finished runs take
  runner clean --checkpoints --failed --yes         remove these and failed runs
  runner clean outputs/sweeps --beyond-best 3 --everything --yes
  runner clean --checkpoints 'valid_loss>2' --tag old
  runner clean --caches --unused 30 --yes
"""
_MAX_STEPS = 6


@dataclass
class Plan:
    """Everything that may go."""

    removals: list[Removal] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    leftovers: list[tuple[RunInfo, list[Path]]] = field(default_factory=list)
    interrupted: list[Path] = field(default_factory=list)
    caches: list[CacheEntry] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to remove."""
        return not (self.removals or self.leftovers or self.interrupted or self.caches)

    @property
    def size_bytes(self) -> int:
        """The bytes that it frees."""
        paths = [path for _, found in self.leftovers for path in found] + self.interrupted
        sizes = [removal.size_bytes for removal in self.removals] + [entry.size_bytes for entry in self.caches]
        return sum(sizes) + sum(map(folder_size, paths))


def run(argv: list[str]) -> int:
    """Show what `argv` asks for, and remove it with --yes or once a person has confirmed it.

    Raises:
        ConfigError: a wrong argument, or no such folder.
        StorageError: the disk fails; what was not reached is untouched.
    """
    options = _parse(argv)
    policies = Policies(
        checkpoints=options.checkpoints,
        failed=options.failed,
        older_days=options.older,
        beyond_best=options.beyond_best,
        everything=options.everything,
        parents=options.parents,
    )
    selection = select(options.path, options.filters, options.tag)
    _require_caches_alone(selection, options)
    context = _context(selection)
    plan = _plan(selection, context, policies, options)
    screen = None if options.json else Screen()
    if screen:
        _print_plan(plan, screen)
    confirmed = options.yes or (screen is not None and not plan.is_empty and _confirm(plan))
    freed, problems = 0, list[Kept]()
    if confirmed and not plan.is_empty:
        if not options.yes:  # the answer may have taken long, and other runs may have begun from these
            context = _context(select(options.path, options.filters, options.tag))
        freed, problems = _remove(plan, policies, context)
    if screen is None:
        print(json_document(_to_dict(plan, confirmed, freed, problems)))
    else:
        _print_outcome(plan, confirmed, freed, problems, argv, screen)
    return EXIT_DONE


def _parse(argv: list[str]) -> Namespace:
    parser = SelectionParser("clean", "folder to look below, a sweep or a run", _EXAMPLES)
    parser.add_argument("--checkpoints", action="store_true", help="checkpoints of finished runs")
    parser.add_argument(
        "--failed",
        action="store_true",
        help="whole runs that failed, diverged or trained nothing, if they have no checkpoint",
    )
    parser.add_argument("--older", type=_days, metavar="DAYS", help="checkpoints of runs not written for so long")
    parser.add_argument(
        "--beyond-best", type=int, metavar="K", help="checkpoints of the ended jobs of each sweep but the best K"
    )
    parser.add_argument("--leftovers", action="store_true", help="what killed processes left behind")
    parser.add_argument("--caches", action="store_true", help="entries of the cache folder; models stay")
    parser.add_argument("--unused", type=_days, metavar="DAYS", help="with --caches: those not used for so long")
    parser.add_argument(
        "--max-size", type=_size, metavar="GB", help="with --caches: the last used within this size stay"
    )
    parser.add_argument(
        "--everything",
        action="store_true",
        help="also the best and the newest checkpoint of runs that ended and have a result (adapters/), and failed "
        "runs that have checkpoints",
    )
    parser.add_argument("--parents", action="store_true", help="also what other runs began from")
    parser.add_argument("--yes", action="store_true", help="remove it; else it is only shown, or asked on a terminal")
    options = parser.parse_intermixed_args(argv)
    chosen = (options.checkpoints, options.failed, options.leftovers, options.caches)
    if not any(chosen) and options.older is None and options.beyond_best is None:
        if options.yes:
            raise ConfigError("runner clean --yes: say what to remove, such as --checkpoints; --help lists it.")
        options.checkpoints = options.failed = options.leftovers = True
    if options.beyond_best is not None and options.beyond_best < 1:
        raise ConfigError(f"--beyond-best {options.beyond_best} is invalid: must be 1 or more.")
    if not options.caches and (options.unused is not None or options.max_size is not None):
        raise ConfigError("--unused and --max-size belong to --caches.")
    return options


def _require_caches_alone(selection: Selection, options: Namespace) -> None:
    """Refuse to select entries of the cache folder by runs, to none of which they belong."""
    of_runs = (options.checkpoints, options.failed, options.leftovers, options.older is not None, options.beyond_best)
    is_path = options.path is not None and not any(of_runs) and not selection.filters
    if options.caches and (selection.filters or is_path):
        what = "PATH is" if is_path else "filters and --tag are"
        raise ConfigError(
            f"runner clean: {what} for runs, and entries of caches belong to none: clean them by themselves, "
            "--caches with --unused DAYS or --max-size GB."
        )


def _context(selection: Selection) -> Context:
    """Return the context of the selected runs among all that may have come from them."""
    known = {entry.path.resolve(): entry for entry in selection.found}
    for entry in (found for folder in _neighbourhood(selection.root.resolve()) for found in find_runs(folder)):
        known.setdefault(entry.path.resolve(), entry)
    return Context.of(list(known.values()))


def _neighbourhood(root: Path) -> list[Path]:
    """Return the folders where runs may be that came from those below `root`, whatever the working directory: all
    folders outputs/, and the runs and sweeps that lie beside it."""
    above = dict.fromkeys((Path(OUTPUTS).resolve(), *root.parents))
    outputs = [path for path in above if path.name == OUTPUTS and path != root and path.is_dir()]
    beside: list[Path] = []
    with suppress(OSError):
        beside = [path for path in sorted(root.parent.iterdir()) if path != root and is_run_or_sweep(path)]
    return [*outputs, *beside] if is_run_or_sweep(root) else outputs


def _plan(selection: Selection, context: Context, policies: Policies, options: Namespace) -> Plan:
    plan = Plan()
    # A selected part of a sweep is judged by the whole of it.
    for run in selection.runs:
        if not facts.is_cleanable(run):
            continue
        removal, kept = decide(facts.read_facts(run, context, verify_result=policies.everything), policies)
        plan.kept += kept
        if removal is not None:
            plan.removals.append(removal)
        is_whole = removal is not None and removal.whole
        in_use = RunDirectory(run.path).is_locked()  # a save in progress is none that was interrupted
        if options.leftovers and not is_whole and not in_use and (found := facts.leftovers(run)):
            plan.leftovers.append((run, found))
    if options.leftovers and not selection.filters:
        plan.interrupted = facts.interrupted_removals(selection.root)
    if options.caches:
        entries = caches.find_entries(cache_dir())
        selected = caches.select_entries(entries, unused_days=options.unused, max_bytes=options.max_size)
        plan.caches = [*selected, *caches.find_drafts(cache_dir())]
    return plan


def _remove(plan: Plan, policies: Policies, context: Context) -> tuple[int, list[Kept]]:
    """Remove what the plan holds; return the bytes that were freed, and what was not removed after all."""
    freed, problems = 0, []
    for removal in plan.removals:
        try:
            freed += remove.carry_out(removal, policies, context)
        except NotRemoved as reason:
            problems.append(Kept(removal.run, str(reason)))
    for run, _ in plan.leftovers:
        try:
            freed += remove.remove_leftovers(run)
        except NotRemoved as reason:
            problems.append(Kept(run.path, str(reason)))
    if plan.interrupted:
        freed += remove.remove_interrupted(plan.interrupted)
    return freed + caches.remove_entries(plan.caches), problems


def _confirm(plan: Plan) -> bool:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    answer = input(f"Remove this ({format_bytes(plan.size_bytes)})? [y/N] ")
    return answer.strip().lower() in ("y", "yes")


def _print_plan(plan: Plan, screen: Screen) -> None:
    rows = [
        TableRow([relative_path(r.run), _what(r), format_bytes(r.size_bytes), _why(r)], {1: "red" if r.whole else ""})
        for r in plan.removals
    ]
    for run, paths in plan.leftovers:
        size = sum(map(folder_size, paths))
        rows.append(
            TableRow([relative_path(run.path), count(len(paths), "leftover"), format_bytes(size), "interrupted"])
        )
    rows += [
        TableRow([relative_path(path), "the rest of a run", format_bytes(folder_size(path)), "interrupted removal"])
        for path in plan.interrupted
    ]
    by_cache: dict[Path, list[int]] = {}
    for entry in plan.caches:
        by_cache.setdefault(entry.cache.folder, []).append(entry.size_bytes)
    for folder, sizes in by_cache.items():
        noun = "entry" if len(sizes) == 1 else "entries"
        rows.append(TableRow([relative_path(folder), f"{len(sizes):,} {noun}", format_bytes(sum(sizes)), "cache"]))
    if rows:
        columns = [Column("path", keep_end=True), Column("what"), Column("size", right=True), Column("why", wrap=True)]
        screen.table(columns, rows)
    for kept in plan.kept:
        screen.line((f"kept  {relative_path(kept.path)}: {kept.reason}", "dim"))


def _print_outcome(
    plan: Plan, confirmed: bool, freed: int, problems: list[Kept], argv: list[str], screen: Screen
) -> None:
    for problem in problems:
        screen.line((f"not removed: {relative_path(problem.path)}: {problem.reason}", "yellow"))
    if plan.is_empty:
        screen.line("Nothing to remove.")
    elif confirmed:
        screen.line(f"{format_bytes(freed)} freed.")
    else:
        how = (
            "--yes removes it."
            if _names_policy(argv)
            else "To remove it, choose with --checkpoints, --failed or --leftovers, and --yes."
        )
        screen.line(f"{format_bytes(plan.size_bytes)} can be freed. Nothing was removed. {how}")


def _names_policy(argv: list[str]) -> bool:
    policies = ("--checkpoints", "--failed", "--leftovers", "--caches", "--older", "--beyond-best")
    return any(argument.partition("=")[0] in policies for argument in argv)


def _what(removal: Removal) -> str:
    return "the whole run" if removal.whole else count(len(removal.steps), "checkpoint")


def _why(removal: Removal) -> str:
    if removal.whole:
        return removal.reason
    keeps = ", ".join(map(str, removal.keeps[-_MAX_STEPS:])) or "adapters/ alone"
    return f"keeps {keeps}" if removal.reason == "finished" else f"keeps {keeps}; {removal.reason}"


def _to_dict(plan: Plan, confirmed: bool, freed: int, problems: list[Kept]) -> dict[str, Any]:
    return {
        "removed": confirmed and not plan.is_empty,
        "size_bytes": plan.size_bytes if not confirmed else freed,
        "runs": [vars(removal) for removal in plan.removals],
        "leftovers": [path for _, paths in plan.leftovers for path in paths] + plan.interrupted,
        "cache_entries": [entry.cache.folder / entry.name for entry in plan.caches],
        "kept": [vars(kept) for kept in [*plan.kept, *problems]],
    }


def _days(text: str) -> float:
    seconds = parse_quantity(text, SECONDS, default=SECONDS["d"])
    if seconds is None or seconds < 0:
        raise ConfigError(f"'{shorten(text)}' is no number of days, such as 30, nor another duration, such as 12h.")
    return seconds / SECONDS["d"]


def _size(text: str) -> float:
    size = parse_quantity(text, BYTES, default=BYTES["gb"])
    if size is None or size < 0:
        raise ConfigError(f"'{shorten(text)}' is no size, such as 5GB.")
    return size
