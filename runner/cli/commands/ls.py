"""`runner ls`: list the runs and sweeps below a folder, with the settings that differ between them, or as a tree."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from runner.cli.commands.selection import Selection, SelectionParser, select
from runner.common.errors import ConfigError
from runner.common.text import relative_path
from runner.reports import settings_text
from runner.reports.cells import run_fields, sweep_fields
from runner.reports.fields import SETTING, Field
from runner.reports.run_filter import SortKey, parse_sort
from runner.reports.run_table import Entry, print_runs, runs_of, settings_rows
from runner.reports.run_tree import tree_rows
from runner.reports.screen import Screen, json_document
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo, differing_settings
from runner.runs.lineage import ParentIndex, parents

_COLUMNS = ("valid_loss", "step", "iters", "age", "size", "state", "name", "tag", "path")
"""Fields that the table shows anyway."""
_EXAMPLES = """\
examples:
  runner ls --sort valid_loss --limit 5
  runner ls 'valid_loss<0.5' 'lora.rank>=8' --sort -valid_loss --tag sql
  runner ls outputs/sweeps state=failed
  runner ls --tree
"""


def run(argv: list[str]) -> int:
    """List the runs and sweeps that `argv` selects.

    Raises:
        ConfigError: a wrong argument, or no such folder.
    """
    options = _parse(argv)
    selection = select(options.path, options.filters, options.tag)
    order = parse_sort(options.sort, [run for entry in selection.found for run in runs_of(entry)])
    ordered = sorted(selection.entries, key=lambda entry: order.key(runs_of(entry)))
    shown = ordered if options.tree else ordered[: options.limit]
    for entry in shown:
        if isinstance(entry, SweepInfo) and options.sort != "age":  # by age the jobs keep the order of their numbers
            entry.runs.sort(key=lambda run: order.key([run]))
    names = settings_text.by_importance(differing_settings([run for entry in shown for run in runs_of(entry)]))
    if options.json:
        index = ParentIndex(selection.found)
        entries = [_to_dict(entry, names, selection, index, options.runs) for entry in shown]
        print(json_document({"root": selection.root, "differing": names, "entries": entries}))
        return 0
    screen = Screen()
    if not shown:
        _print_nothing(selection, screen)
        return 0
    fields = _further_fields(selection, order)
    if options.tree:
        rows = tree_rows(shown, selection.totals, limit=options.limit, ascii_only=not screen.draws_braille)
        print_runs(screen, selection.root, rows, fields, last_title="from, and what changed")
    else:
        print_runs(
            screen, selection.root, settings_rows(shown, names, selection.totals, with_runs=options.runs), fields
        )
    if len(selection.entries) > len(shown):
        more = len(selection.entries) - len(shown)
        screen.line((f"{more} more; --limit {len(selection.entries)} shows all.", "dim"))
    return 0


def _parse(argv: list[str]) -> Namespace:
    parser = SelectionParser("ls", "folder to look below", _EXAMPLES)
    parser.add_argument("--runs", action="store_true", help="also all jobs of each sweep")
    parser.add_argument(
        "--sort",
        metavar="FIELD",
        default="age",
        help="age (newest first, the default), valid_loss or another metric, any setting, name, state; size and step "
        "begin with the largest; a - in front turns the order round",
    )
    parser.add_argument("--tree", action="store_true", help="each run below the run that it comes from")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N runs and sweeps only; of a tree, N roots")
    options = parser.parse_intermixed_args(_join_sort(argv))
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"runner ls: --limit {options.limit} is invalid: must be 1 or more.")
    if options.tree and options.runs:
        raise ConfigError("runner ls: --tree shows the jobs that others come from: leave out --runs.")
    return options


def _join_sort(argv: Sequence[str]) -> list[str]:
    """Return `argv` with the word behind --sort joined to it, since `-valid_loss` looks like an option."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] == "--sort":
            joined[-1] = f"--sort={argument}"
        else:
            joined.append(argument)
    return joined


def _further_fields(selection: Selection, order: SortKey) -> list[Field]:
    """Return the metrics that were filtered or sorted by and that have no column."""
    named = [*(found.field for found in selection.filters), order.field]
    return list({f.name: f for f in named if f.kind != SETTING and f.name not in _COLUMNS}.values())


def _print_nothing(selection: Selection, screen: Screen) -> None:
    root = relative_path(selection.root)
    if selection.found:
        screen.line(f"None of the {len(selection.found)} runs and sweeps below {root} passes the filters.")
    else:
        screen.line(f"No runs below {root}. The first one: python -m runner experiment=first_run")


def _to_dict(
    entry: Entry, names: Sequence[str], selection: Selection, index: ParentIndex, with_runs: bool
) -> dict[str, Any]:
    fields = sweep_fields(entry) if isinstance(entry, SweepInfo) else run_fields(entry)
    found = {parent: index.find(parent) for parent in parents(entry)}
    origins = [{**p.to_dict(), "found": member.path if member else None} for p, member in found.items()]
    if isinstance(entry, RunInfo):
        settings = {name: entry.settings[name] for name in names if name in entry.settings}
        return {"kind": "run", **fields, "parents": origins, "settings": settings}
    fields = {"kind": "sweep", **fields, "parents": origins}
    total = selection.totals.get(entry.path)
    if total is not None:
        fields["jobs"] = total
    if with_runs or total is not None:
        fields["runs"] = [_to_dict(run, names, selection, index, False) for run in entry.runs]
    return fields
