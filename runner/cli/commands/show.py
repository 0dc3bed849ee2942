"""`runner show`: one run or sweep: how it stands, what it was told, how it learned, what it left, how to go on."""

from __future__ import annotations

from pathlib import Path

from runner.checkpoints.verify import STEP_NAME
from runner.cli.commands import COMMANDS, CommandParser
from runner.common.errors import ConfigError, did_you_mean
from runner.common.text import relative_path
from runner.reports.screen import Screen, json_document
from runner.runs.find import find_runs, is_sweep, looks_like_run, read_sweep
from runner.runs.inspect import read_run


def run(argv: list[str]) -> int:
    """Show what `argv` names.

    Raises:
        ConfigError: a word that is not understood, or neither a run nor a sweep.
    """
    parser = CommandParser(prog="runner show", description=COMMANDS["show"])
    parser.add_argument("path", metavar="RUN|SWEEP", help="its directory")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    words = parser.parse_args(argv)
    path = Path(words.path).expanduser()
    sweep = _is_sweep_not_run(path)
    if sweep:
        from runner.reports.sweep_page import print_sweep_page, sweep_page_fields

        found = read_sweep(path)
        if words.json:
            print(json_document(sweep_page_fields(found)))
        else:
            print_sweep_page(found, Screen())
        return 0
    from runner.reports.run_page import print_run_page, read_run_page, run_page_fields

    page = read_run_page(read_run(path))
    if words.json:
        print(json_document(run_page_fields(page)))
    else:
        print_run_page(page, Screen())
    return 0


def _is_sweep_not_run(path: Path) -> bool:
    """Which of the two `path` is.

    Raises:
        ConfigError: neither; says what it is instead.
    """
    if not path.is_dir():
        near = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        what = "it is not a folder" if path.exists() else "there is no such folder"
        raise ConfigError(f"{path}: {what}.{did_you_mean(path.name, near)}")
    if is_sweep(path):
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
