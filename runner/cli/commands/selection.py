"""The arguments PATH, FILTER and --tag, by which ls, best and clean select runs."""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runner.cli.commands import COMMANDS, CommandParser
from runner.cli.run_argument import OUTPUTS, missing_run, resolve_name
from runner.common.errors import ConfigError
from runner.common.text import relative_path, single_line
from runner.reports.run_filter import Filter, looks_like_filter, parse_filter, resembles_filter, tag_filters
from runner.reports.run_table import Entry, runs_of
from runner.runs.find import SweepInfo, find_runs
from runner.runs.inspect import RunInfo

FILTERS_HELP = (
    "conditions, all of which hold: 'valid_loss<0.5' 'lora.rank>=8' state=finished 'model.path~qwen' 'age<2d' "
    "(~ means contains, != and !~ the opposite; quote < and > for the shell)"
)


@dataclass(frozen=True)
class Selection:
    """The runs and sweeps that were selected."""

    root: Path
    filters: tuple[Filter, ...]
    found: list[Entry]
    """All at or below `root`, newest first."""
    entries: list[Entry]
    """Those selected; of a sweep with other jobs too, a copy with the selected ones."""
    totals: dict[Path, int]
    """Path to the number of jobs of each sweep of which only some are selected."""

    @property
    def runs(self) -> list[RunInfo]:
        """The selected runs, jobs of sweeps among them."""
        return [run for entry in self.entries for run in runs_of(entry)]


class SelectionParser(CommandParser):
    """The parser of a command that selects runs: PATH, FILTER, --tag and --json."""

    def __init__(self, command: str, path_help: str, examples: str) -> None:
        super().__init__(
            prog=f"runner {command}",
            description=COMMANDS[command],
            epilog=examples,
            formatter_class=RawDescriptionHelpFormatter,
        )
        self.add_argument("path", metavar="PATH", nargs="?", help=f"{path_help} (default: {OUTPUTS})")
        self.add_argument("filters", metavar="FILTER", nargs="*", help=FILTERS_HELP)
        self.add_argument(
            "--tag", metavar="TAG", action="append", default=[], help="only what has this tag; several: all of them"
        )
        self.add_argument("--json", action="store_true", help="one JSON document on standard output")


def select(path: str | None, filters: Sequence[str], tags: Sequence[str]) -> Selection:
    """Find the runs and sweeps below `path` and select those that pass all filters and have all tags.

    Raises:
        ConfigError: no such folder, several folders, or a filter that is none.
    """
    texts = [text for text in (path, *filters) if text is not None]
    folders = [text for text in texts if not looks_like_filter(text) or Path(text).expanduser().exists()]
    if len(folders) > 1:
        raise ConfigError(
            f"'{folders[1]}' is neither a filter, such as 'valid_loss<0.5', nor the only PATH: {folders[0]} is one."
        )
    root = resolve_name(folders[0] if folders else OUTPUTS)
    if not root.is_dir() and (folders or root.exists()):
        if not root.exists() and resembles_filter(folders[0]):
            parse_filter(folders[0])  # which says what is wrong with it
        raise ConfigError(missing_run(root))
    found = find_runs(root, _note_unlisted)
    runs = [run for entry in found for run in runs_of(entry)]
    parsed = [parse_filter(text, runs) for text in texts if text not in folders]
    return _filtered(root, found, (*parsed, *tag_filters(tags)))


def _note_unlisted(folder: Path, error: OSError) -> None:
    reason = error.strerror or type(error).__name__
    print(f"{single_line(relative_path(folder))} is not listed: {reason}", file=sys.stderr)


def _filtered(root: Path, found: list[Entry], filters: tuple[Filter, ...]) -> Selection:
    if not filters:
        return Selection(root, filters, found, found, {})
    entries: list[Entry] = []
    totals: dict[Path, int] = {}
    for entry in found:
        accepted = [run for run in runs_of(entry) if all(found.accepts(run) for found in filters)]
        if not accepted:
            continue
        if isinstance(entry, SweepInfo) and len(accepted) < len(entry.runs):
            totals[entry.path] = len(entry.runs) + entry.waiting
            entry = replace(entry, runs=accepted, waiting=0)
        entries.append(entry)
    return Selection(root, filters, found, entries, totals)
