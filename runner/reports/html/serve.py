"""A page that follows what it shows: served on the loopback interface, made anew while files change.

Only the page and its data are served, no file. A request that names another host than this one is refused: a page from
elsewhere may have had its name resolved to this machine, to read what is served here.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from runner.common.errors import ConfigError, RunnerError
from runner.reports.html.page import Page, page_json, render
from runner.reports.html.write import make_page

HOST = "127.0.0.1"
REFRESH_SECONDS = 2.0
"""How often the page asks for new data."""
_SHARE_OF_TIME = 0.1
"""Of the time that may be spent on making the page, which takes longer the more runs it shows."""
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


class LivePage:
    """The page of what is at `path`, made again when it is asked for and the last one is old enough."""

    def __init__(self, path: Path, make: Callable[[Path], Page] = make_page) -> None:
        """Make the page for the first time.

        Raises:
            ConfigError: see `make_page`.
        """
        self._path, self._make = path, make
        self._lock = threading.Lock()
        self._page = make(path)
        self._made, self._seconds = time.monotonic(), 0.0

    def current(self) -> Page:
        """Return the page; the one before where what it shows cannot be read at this moment."""
        with self._lock:
            start = time.monotonic()
            if start - self._made > self._seconds / _SHARE_OF_TIME:
                with suppress(RunnerError, OSError):  # it was moved or removed: what was last seen stays
                    self._page = self._make(self._path)
                self._made = time.monotonic()
                self._seconds = self._made - start
            return self._page


class ReportServer(ThreadingHTTPServer):
    """Serves one live page at `url`."""

    daemon_threads = True

    def __init__(self, page: LivePage, port: int = 0) -> None:
        """Listen on `port` of the loopback interface, or on a free one.

        Raises:
            ConfigError: the port cannot be used.
        """
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "must be from 0 to 65535"
            raise ConfigError(f"--port {port}: {reason}. Without --port a free one is chosen.") from None
        self.page = page
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    protocol_version = "HTTP/1.1"
    server_version = "runner"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, b"This page is served on the loopback interface only.\n")
            return
        page = self.server.page.current()
        if self.path == "/":
            self._answer(HTTPStatus.OK, render(page, REFRESH_SECONDS).encode(), "text/html; charset=utf-8")
        elif self.path == "/data.json":
            content = page_json(page, REFRESH_SECONDS).encode()
            tag = f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"'
            if self.headers.get("If-None-Match") == tag:
                self._answer(HTTPStatus.NOT_MODIFIED, b"", tag=tag)
            else:
                self._answer(HTTPStatus.OK, content, "application/json", tag=tag)
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"There is the page at / and nothing else.\n")

    do_HEAD = do_GET

    def _answer(
        self, status: HTTPStatus, content: bytes, kind: str = "text/plain; charset=utf-8", tag: str | None = None
    ) -> None:
        headers: Mapping[str, str] = {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the terminal belongs to the user."""
