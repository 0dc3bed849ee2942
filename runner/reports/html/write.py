"""Making and writing the page of a run, a sweep or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runner.common import layout
from runner.common.atomic_io import write_atomically
from runner.common.errors import ConfigError
from runner.reports.comparison import Comparison
from runner.reports.html.comparison_report import comparison_report
from runner.reports.html.folder_report import folder_report
from runner.reports.html.page import GENERATOR, Page, render
from runner.reports.html.run_report import run_report
from runner.reports.html.sweep_report import sweep_report
from runner.reports.run_page import read_run_page
from runner.runs.find import find_runs, is_sweep_folder, looks_like_run, read_sweep
from runner.runs.inspect import read_run

_HEAD_BYTES = 8192
"""Where a page names its generator."""


def make_page(path: Path, errors: Mapping[int, str] | None = None) -> Page:
    """Return the page of the run or the sweep at `path`, or of all that lies below it.

    `errors` are those of `sweep_report`.

    Raises:
        ConfigError: `path` is no folder, or there is nothing below it.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: {'it is not a folder' if path.exists() else 'there is no such folder'}.")
    if is_sweep_folder(path):
        return sweep_report(read_sweep(path), errors)
    if looks_like_run(entry.name for entry in path.iterdir()):
        return run_report(read_run_page(read_run(path)))
    entries = find_runs(path)
    if not entries:
        raise ConfigError(f"{path} is no run and no sweep, and there is none below it.")
    return folder_report(path, entries)


def write_report(path: Path, output: Path | None = None, errors: Mapping[int, str] | None = None) -> Path:
    """Write the page of what is at `path` into its folder, or to `output`, and return where it is.

    Raises:
        ConfigError: see `make_page`; or where it is to be written is something else than a page.
        StorageError: the file cannot be written; an earlier one stays.
    """
    target = output or path / layout.REPORT
    page = make_page(path, errors)
    _require_replaceable(target)
    write_atomically(target, render(page, place=target.parent), durable=False)
    return target


def write_comparison(comparison: Comparison, output: Path) -> Path:
    """Write the page of a comparison to `output`, and return it.

    Raises:
        ConfigError: `output` is something else than a page.
        StorageError: the file cannot be written; an earlier one stays.
    """
    _require_replaceable(output)
    write_atomically(output, render(comparison_report(comparison)), durable=False)
    return output


def _require_replaceable(target: Path) -> None:
    """Refuse to write a page over what is not one, such as a run's files, or where there is no folder for it.

    Raises:
        ConfigError: says what stands there.
    """
    if target.is_dir():
        raise ConfigError(f"{target} is a folder: name a file in it, such as {target / layout.REPORT}.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}; make it first.")
    if not target.is_symlink() and not target.exists():
        return
    if target.is_symlink() or not target.is_file() or not _is_page(target):
        raise ConfigError(f"{target} exists already and is no page of runner; it is not replaced. Choose another name.")


def _is_page(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return f'name="generator" content="{GENERATOR}'.encode() in opened.read(_HEAD_BYTES)
    except OSError:
        return False


def write_report_or_say_why(path: Path, errors: Mapping[int, str] | None = None) -> str | None:
    """Write the page of what is at `path`; return why there is none, as one line, instead of raising anything."""
    try:
        write_report(path, errors=errors)
    except Exception as error:  # a page is never worth a run
        return f"{layout.REPORT} was not written: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}"
    return None
