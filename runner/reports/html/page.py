"""A page as one HTML file: its data as JSON, and the style sheet and scripts in `assets/` that draw it.

The file asks the network for nothing. Its Content-Security-Policy allows the scripts and styles whose hashes it names
and nothing else, so that no text of a run can become code, even if one found its way into the markup.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from runner.common.clock import utc_now
from runner.reports.html.links import relocated
from runner.reports.html.private import Privacy
from runner.reports.html.sections import Part

GENERATOR = "runner report"
"""By which a page is known as one, among its first lines."""
_ASSETS = Path(__file__).parent.parent / "assets"
_STYLES = ("uPlot.min.css", "page.css")
_LOCALE, _LIBRARY, _LIBRARY_LICENCE = "locale.js", "uPlot.iife.min.js", "uPlot.LICENSE.txt"
_SCRIPTS = ("elements.js", "highlight.js", "chart.js", "table.js", "parallel.js", "parts.js", "main.js")
"""In the order in which they need each other; together they are one script."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows, from top to bottom."""

    kind: str
    """run, sweep, folder or another word for the line above the title."""
    title: str
    folder: Path
    """What it is about; paths in its texts are shown relative to it."""
    state: str | None = None
    lines: Sequence[str] = ()
    """Sentences below the title."""
    tags: Sequence[str] = ()
    up: Part | None = None
    """A `sections.link` to the page above, such as that of the sweep of a job."""
    parts: Sequence[Part] = field(default_factory=tuple)
    hosts: Iterable[object] = ()
    """Names of machines that must not stand in the page, beside this one."""


def page_json(page: Page, refresh: float | None = None, place: Path | None = None) -> str:
    """Return the data of a page as JSON that is safe inside a script element.

    Args:
        refresh: seconds after which the page asks where it came from for new data; None for a file.
        place: the folder that the file is written into; None for that of the page.
    """
    data: dict[str, Any] = {
        "kind": page.kind,
        "title": page.title,
        "state": page.state,
        "lines": list(page.lines),
        "tags": list(page.tags),
        "up": page.up,
        "parts": [part for part in page.parts if part],
        "refresh": refresh,
    }
    data = relocated(data, page.folder, page.folder if place is None else place)
    return _embedded(Privacy(page.folder, page.hosts).clean(data))


def render(page: Page, refresh: float | None = None, place: Path | None = None) -> str:
    """Return the page as the text of an HTML file; `refresh` and `place` as for `page_json`."""
    title = Privacy(page.folder, page.hosts).text(f"{page.title} · {page.kind}")
    return document(page_json(page, refresh, place), title=title, made=utc_now(), live=refresh is not None)


def document(data: str, *, title: str, made: str, live: bool) -> str:
    """Return the HTML around the `data` of a page; a `live` one may ask its own server for new data."""
    styles, scripts = _assets()
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(_hash(script) for script in scripts)}",
            f"style-src {' '.join(_hash(style) for style in styles)}",
            "img-src data:",
            *(["connect-src 'self'"] if live else []),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            '<meta name="referrer" content="no-referrer">',
            f'<meta name="generator" content="{GENERATOR}, {escape(made)}">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            *(f"<style>{style}</style>" for style in styles),
            "</head>",
            "<body>",
            "<noscript>This page is drawn by a script inside it. Without one: python -m runner show</noscript>",
            f'<script type="application/json" id="data">{data}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        ]
    )


@cache
def _assets() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the style sheets and the scripts of every page."""
    scripts = "\n".join(_read(name) for name in _SCRIPTS)
    library = f"{_read(_LOCALE)}/*\n{_read(_LIBRARY_LICENCE)}*/\n{_read(_LIBRARY)}"
    return tuple(_read(name) for name in _STYLES), (library, f'"use strict";\n(() => {{\n{scripts}\n}})();\n')


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{b64encode(digest).decode()}'"


def _embedded(data: Any) -> str:
    """Return `data` as JSON without the characters that could end a script element or open a comment in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
