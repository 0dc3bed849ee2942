"""`runner report`: a run, a sweep or all runs below a folder as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from runner.cli.commands import COMMANDS, CommandParser
from runner.cli.run_argument import resolve_name
from runner.common.errors import ConfigError
from runner.common.layout import REPORT
from runner.common.text import relative_path
from runner.reports.screen import Screen

_MAX_PORT = 65535


def run(argv: list[str]) -> int:
    """Write or serve the page that `argv` asks for.

    Raises:
        ConfigError: a wrong argument, or nothing to report on.
        StorageError: the page cannot be written.
        KeyboardInterrupt: Ctrl-C ended --watch.
    """
    parser = CommandParser(prog="runner report", description=COMMANDS["report"])
    parser.add_argument("path", metavar="RUN|SWEEP|FOLDER", help="its directory, or a folder with runs below it")
    parser.add_argument(
        "--output", metavar="FILE", help=f"where to write the page (default: {REPORT} in the directory)"
    )
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.add_argument(
        "--watch", action="store_true", help="serve a page on this machine that follows runs in progress, until Ctrl-C"
    )
    parser.add_argument("--port", type=int, metavar="N", help="port for --watch (default: a free one)")
    options = parser.parse_args(argv)
    path = resolve_name(options.path)
    if options.watch and options.output is not None:
        raise ConfigError("runner report: --watch serves the page and writes no file: leave out --output.")
    if options.port is not None and not options.watch:
        raise ConfigError("runner report: --port is for --watch.")
    if options.port is not None and not 0 <= options.port <= _MAX_PORT:
        raise ConfigError(f"runner report: --port {options.port} is invalid: must be from 0 to {_MAX_PORT}.")
    if options.watch:
        return _watch(path, options.port or 0, options.open)
    from runner.reports.html.write import write_report

    output = Path(options.output).expanduser() if options.output is not None else None
    written = write_report(path, output)
    Screen().line(relative_path(written))
    if options.open:
        _open(written.absolute().as_uri())
    return 0


def _watch(path: Path, port: int, opens: bool) -> int:
    from runner.reports.html.serve import LivePage, ReportServer

    with ReportServer(LivePage(path), port) as server:
        print(f"{server.url} shows {relative_path(path)} until Ctrl-C", flush=True)
        if opens:
            _open(server.url)
        server.serve_forever()
    return 0


def _open(url: str) -> None:
    import webbrowser

    if not webbrowser.open(url):
        raise ConfigError(f"there is no browser to open; the page is at {url}")
