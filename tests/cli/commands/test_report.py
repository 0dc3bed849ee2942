"""`runner report` writes pages, and serves one that follows its runs on the loopback interface alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import run_folders

from runner.reports.html.write import write_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_folders.make_run(tmp_path / "outputs/run")


def test_it_prints_where_the_page_is(inline: Any, run: Path, tmp_path: Path) -> None:
    assert inline("report", "outputs/run") == "outputs/run/report.html\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert inline("report", "outputs") == "outputs/report.html\n"
    assert inline("report", "outputs/run", "--output", "page.html") == "page.html\n"
    assert (tmp_path / "page.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "there is no such folder"),
        (["outputs/run", "--watch", "--output", "x"], "leave out --output"),
        (["outputs/run", "--port", "1"], "--port is for --watch"),
        (["outputs/run", "--watch", "--port", "70000"], "must be from 0 to 65535"),
        (["outputs/run", "--output", "outputs"], "is a folder"),
    ],
)
def test_wrong_arguments(inline: Any, run: Path, arguments: list[str], message: str) -> None:
    assert message in inline("report", *arguments, expect=2)


@pytest.mark.parametrize("what", ["settings", "notes", "link", "pipe"])
def test_only_a_page_is_replaced(inline: Any, run: Path, tmp_path: Path, what: str) -> None:
    target = run / "config.yaml" if what == "settings" else tmp_path / "there"
    if what == "notes":
        target.write_text("python -m runner report outputs")
    elif what == "link":
        inline("report", "outputs/run", "--output", "page.html")
        target.symlink_to("page.html")
    elif what == "pipe":
        os.mkfifo(target)
    before = target.lstat()
    for command in (["report", "outputs/run", "--output"], ["compare", "outputs/run", "outputs/other", "--html"]):
        run_folders.make_run(tmp_path / "outputs/other")
        assert "exists already and is no page of runner" in inline(*command, str(target), expect=2)
    after = target.lstat()
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)


def test_a_page_is_replaced_and_its_folder_must_be_there(inline: Any, run: Path) -> None:
    for _ in range(2):
        assert inline("report", "outputs/run", "--output", "page.html") == "page.html\n"
    assert "there is no folder nowhere" in inline("report", "outputs/run", "--output", "nowhere/page.html", expect=2)


def test_it_needs_neither_mlx_nor_hydra(run: Path) -> None:
    code = (
        "import sys; from runner.cli.main import main; main(['report', sys.argv[1]]);"
        "print(sorted({'mlx', 'hydra', 'omegaconf', 'mlx_lm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.fixture
def served(cli: Any, run: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that serves the page, and its port."""
    process = cli.start("report", "outputs/run", "--watch")
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ shows outputs/run until Ctrl-C\n", line)
        assert found, line
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def test_watch_serves_the_page_and_nothing_else_until_ctrl_c(
    served: tuple[subprocess.Popen[str], int], run: Path
) -> None:
    process, port = served
    status, headers, content = ask(port, "/")
    assert status == 200 and b'"refresh":2.0' in content and headers["X-Content-Type-Options"] == "nosniff"
    status, headers, content = ask(port, "/data.json")
    assert status == 200 and json.loads(content)["title"] == "run"
    assert ask(port, "/data.json", **{"If-None-Match": headers["ETag"]})[0] == 304
    written = json.loads((run / "status.json").read_text()) | {"best": {"valid_loss": 0.0123, "step": 39}}
    (run / "status.json").write_text(json.dumps(written))
    while ask(port, "/data.json", **{"If-None-Match": headers["ETag"]})[0] == 304:
        pass  # the page is not made for every request
    assert b"0.0123" in ask(port, "/data.json")[2]
    for path in ("/status.json", "/../config.yaml", "/report.html", "/?x"):
        assert ask(port, path)[0] == 404
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""):
        assert ask(port, "/", Host=host)[0] == 421
    assert ask(port, "/", Host=f"localhost:{port}")[0] == 200
    assert ask(port, "/", method="POST")[0] == 501 and ask(port, "/", method="HEAD")[2] == b""
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and process.stdout is not None and process.stdout.read() == ""


def test_a_port_in_use_is_an_error(served: tuple[subprocess.Popen[str], int], inline: Any) -> None:
    assert "Without --port a free one is chosen" in inline(
        "report", "outputs/run", "--watch", "--port", str(served[1]), expect=2
    )


def test_the_links_of_a_page_that_is_written_elsewhere_lead_to_the_pages_of_its_runs(
    inline: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folders.make_run(tmp_path / "outputs/a b")
    for folder in ("outputs/run", "outputs/a b"):
        inline("report", folder)
    (tmp_path / "pages/deep").mkdir(parents=True)
    for place in ("outputs/all.html", "all.html", "pages/deep/all.html"):
        inline("report", "outputs", "--output", place)
        hrefs = re.findall(r'"href":"(\./[^"]*)"', (tmp_path / place).read_text())
        pages = {((tmp_path / place).parent / unquote(href)).resolve() for href in hrefs}
        assert pages == {run / "report.html", tmp_path / "outputs/a b/report.html"}
    monkeypatch.chdir(tmp_path / "pages/deep")  # the way to the runs would name folders above this one
    written = write_report(tmp_path / "outputs", tmp_path / "pages/all.html").read_text()
    assert '"text":"a b","href":null' in written and '"href":"' not in written
