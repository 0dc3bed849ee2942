"""A headless browser, and pages opened in it that may cause no error, warning or request."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import headless_browser
import pytest

from runner.reports.html.write import write_report


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = headless_browser.find()
    if found is None:
        pytest.skip("no Chromium is installed: python tests/headless_browser.py")
    with playwright.sync_playwright() as driver:
        environment = {**os.environ, **found.environment}
        opened = driver.chromium.launch(executable_path=found.executable, env=environment)
        yield opened
        opened.close()


@pytest.fixture
def open_url(browser: Any) -> Iterator[Callable[..., Any]]:
    """`open_url(url, width=1280, scheme="light")` returns a page; at its end it must have caused no error, warning or
    request to anywhere else."""
    problems: list[str] = []
    contexts = []

    def do(url: str, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda request: request.url.startswith((url, "data:")) or problems.append(request.url))
        page.goto(url)
        return page

    yield do
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def open_report(open_url: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`open_report(folder)` writes the page of a folder and opens it."""

    def do(folder: Path, **options: Any) -> Any:
        return open_url(write_report(folder).absolute().as_uri(), **options)

    return do
