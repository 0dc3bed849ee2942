"""`runner compare`: runs side by side, and whether they differ by more than noise."""

from __future__ import annotations

import argparse
from pathlib import Path

from runner.cli.commands import COMMANDS, CommandParser
from runner.cli.commands.output_paths import holds_sweep
from runner.cli.run_argument import resolve_name
from runner.common.errors import ConfigError
from runner.common.text import relative_path
from runner.reports.screen import Screen, json_document
from runner.runs.find import read_sweep
from runner.runs.inspect import RunInfo, read_run
from runner.runs.timeline import AXES

_EPILOG = """\
The verdict is a bootstrap over the rows that all runs were evaluated on, paired by row, at each run's best
evaluation. Runs that differ by their seed alone count as one, and the spread of the seeds is part of the interval.
The 95 % intervals hold for all pairs together (max-t), so that it needs no further correction for
the number of runs. docs/compare.md has an example and the method.
"""


def run(argv: list[str]) -> int:
    """Compare the runs that `argv` names.

    Raises:
        ConfigError: a wrong argument, a path that is neither a run nor a sweep, or fewer than two runs.
    """
    parser = CommandParser(
        prog="runner compare",
        description=COMMANDS["compare"],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", metavar="RUN|SWEEP", nargs="+", help="run directories; of a sweep all its jobs")
    parser.add_argument("--x", choices=AXES, default="step", help="what the curves are drawn over (default: step)")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page instead of printing")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_args(argv)
    runs = _find_runs([resolve_name(path) for path in options.paths])
    if len(runs) < 2:
        found = runs[0].path if runs else "none"
        raise ConfigError(f"runner compare needs two runs or more, or a sweep with as many jobs; found: {found}.")
    from runner.reports import comparison

    compared = comparison.compare(runs)
    if options.html is not None:
        from runner.reports.html.write import write_comparison

        Screen().line(relative_path(write_comparison(compared, Path(options.html).expanduser())))
    elif options.json:
        print(json_document(comparison.comparison_fields(compared)))
    else:
        comparison.print_comparison(compared, Screen(), options.x)
    return 0


def _find_runs(paths: list[Path]) -> list[RunInfo]:
    """Return the runs at `paths` and the jobs of the sweeps there, each once."""
    found: dict[Path, RunInfo] = {}
    for path in paths:
        for info in read_sweep(path).runs if holds_sweep(path, "compare") else [read_run(path)]:
            found.setdefault(info.path.resolve(), info)
    return list(found.values())
