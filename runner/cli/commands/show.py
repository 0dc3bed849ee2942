"""`runner show`: the state, settings, curves and checkpoints of a run or sweep, and the commands to type next."""

from __future__ import annotations

from runner.cli.commands import COMMANDS, CommandParser
from runner.cli.commands.output_paths import holds_sweep
from runner.cli.run_argument import resolve_name
from runner.reports.screen import Screen, json_document
from runner.runs.find import read_sweep
from runner.runs.inspect import read_run


def run(argv: list[str]) -> int:
    """Show the run or sweep that `argv` names.

    Raises:
        ConfigError: a wrong argument, or a path that is neither a run nor a sweep.
    """
    parser = CommandParser(prog="runner show", description=COMMANDS["show"])
    parser.add_argument("path", metavar="RUN|SWEEP", help="its directory or its name")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_args(argv)
    path = resolve_name(options.path)
    if holds_sweep(path, "show"):
        from runner.reports.sweep_page import print_sweep_page, sweep_page_fields

        sweep = read_sweep(path)
        if options.json:
            print(json_document(sweep_page_fields(sweep)))
        else:
            print_sweep_page(sweep, Screen())
        return 0
    from runner.reports.run_page import print_run_page, read_run_page, run_page_fields

    page = read_run_page(read_run(path))
    if options.json:
        print(json_document(run_page_fields(page)))
    else:
        print_run_page(page, Screen())
    return 0
