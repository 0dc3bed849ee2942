"""`runner show`: the state, settings, curves and checkpoints of a run or sweep, and the commands to type next."""

from __future__ import annotations

from pathlib import Path

from runner.cli.commands import COMMANDS, CommandParser
from runner.common.errors import ConfigError, did_you_mean
from runner.common.layout import STEP_NAME
from runner.common.text import relative_path
from runner.reports.screen import Screen, json_document
from runner.runs.find import find_runs, is_sweep_folder, looks_like_run, read_sweep
from runner.runs.inspect import read_run


def run(argv: list[str]) -> int:
    """Show the run or sweep that `argv` names.

    Raises:
        ConfigError: a wrong argument, or a path that is neither a run nor a sweep.
    """
    parser = CommandParser(prog="runner show", description=COMMANDS["show"])
    parser.add_argument("path", metavar="RUN|SWEEP", help="its directory")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    options = parser.parse_args(argv)
    path = Path(options.path).expanduser()
    if _holds_sweep(path):
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


def _holds_sweep(path: Path) -> bool:
    """Return whether `path` holds a sweep, and not a run.

    Raises:
        ConfigError: it holds neither; the message says what it holds.
    """
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        problem = "it is not a folder" if path.exists() else "there is no such folder"
        raise ConfigError(f"{path}: {problem}.{did_you_mean(path.name, siblings)}")
    if is_sweep_folder(path):
        return True
    try:
        names = [p.name for p in path.iterdir()]
    except OSError as error:
        raise ConfigError(f"{path} cannot be listed: {error.strerror}.") from None
    if looks_like_run(names) or "config.yaml" in names or "status.json" in names:
        return False
    if STEP_NAME.fullmatch(path.name) and (path.parent.parent / "config.yaml").is_file():
        raise ConfigError(f"{path} is a checkpoint. Its run: python -m runner show {relative_path(path.parent.parent)}")
    below = f" Runs lie below it: python -m runner ls {relative_path(path)}" if find_runs(path) else ""
    raise ConfigError(f"{path} is neither a run (no config.yaml) nor a sweep (no multirun.yaml).{below}")
