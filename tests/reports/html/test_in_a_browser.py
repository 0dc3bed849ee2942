"""Pages in a real browser: they draw, sort, highlight and follow; they ask for nothing and run no foreign code."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import run_folders
from searched_sweeps import write_search

from runner.reports.html import serve
from runner.reports.html.serve import LivePage, ReportServer

Open = Callable[..., Any]
HOSTILE = "</script><script>hacked = 1</script><img src=x onerror=hacked=1><!--<script>'\"`${hacked=1}\u2028\u202eevil"
JOBS = "#jobs-title ~ .scroll tr[data-id]"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of sixteen jobs, four of which diverged."""
    return run_folders.make_sweep(tmp_path_factory.mktemp("sweeps") / "ranks", run_folders.GRID)


def column(page: Any, number: int, table: str = "jobs") -> list[str]:
    """The texts of a column of a table, as shown."""
    rows = page.locator(f"section.table:has(#{table}-title) tbody tr[data-id]")
    return rows.evaluate_all(f"rows => rows.map((row) => row.cells[{number}].textContent)")


def highlighted(page: Any) -> list[str]:
    """The jobs whose rows are highlighted."""
    return page.locator("#jobs-title ~ .scroll tr.on").evaluate_all("rows => rows.map((row) => row.dataset.id)")


def inked(page: Any, selector: str) -> int:
    """The number of pixels of a chart that are not blank."""
    script = """canvas => {
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
        return data.filter((value, i) => i % 4 === 3 && value > 0).length;
    }"""
    return page.locator(selector).first.evaluate(script)


def test_a_run_has_its_charts_answers_checkpoints_and_commands(open_report: Open, tmp_path: Path) -> None:
    run = run_folders.make_run(tmp_path / "run", samples=run_folders.answers())
    page = open_report(run)
    assert page.locator("h1").inner_text() == "run\n✓\nfinished"
    captions = page.locator("figcaption").evaluate_all("all => all.map((one) => one.firstChild.textContent)")
    assert captions == ["Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"]
    for number in range(5):
        assert inked(page, f"figure >> nth={number} >> canvas") > 500
    assert page.locator(".sample:visible").count() == 4 and page.get_by_text("✓ right").count() == 3
    page.get_by_text("2 more").click()
    assert page.locator(".sample:visible").count() == 6
    assert page.locator("code", has_text="python -m runner repeat=run").count() >= 1


def test_the_axis_the_scale_and_the_curves_can_be_chosen(open_report: Open, tmp_path: Path) -> None:
    page = open_report(run_folders.make_run(tmp_path / "run"))
    readout = page.locator(".readout").first
    assert "at step 40" in readout.inner_text()
    page.get_by_label("tokens", exact=True).check()
    assert "at tokens 4,000" in readout.inner_text()
    before = inked(page, "canvas")
    page.get_by_role("button", name="train").click()
    assert "train" not in readout.inner_text() and inked(page, "canvas") < before
    button = page.get_by_role("button", name="log scale")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"


def test_the_arrow_keys_read_a_chart(open_report: Open, tmp_path: Path) -> None:
    page = open_report(run_folders.make_run(tmp_path / "run"))
    page.locator(".plot").first.focus()
    page.keyboard.press("End")
    readout = page.locator(".readout").first
    assert readout.inner_text().startswith("step 40 · train ") and readout.get_attribute("aria-live") == "polite"
    page.keyboard.press("ArrowLeft")
    assert readout.inner_text().startswith("step 39 · ")


def test_a_table_is_sorted_by_a_click_on_a_title(open_report: Open, sweep: Path) -> None:
    page = open_report(sweep)
    losses = column(page, 1)
    assert losses[:12] == sorted(losses[:12]) and losses[12:] == ["–"] * 4
    page.get_by_role("button", name="rank").click()
    assert column(page, 2) == [text for text in ("2", "4", "8", "16") for _ in range(4)]
    heading = page.locator("th", has=page.get_by_role("button", name="rank"))
    assert heading.get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="valid loss").click()
    page.get_by_role("button", name="valid loss").press("Enter")
    assert column(page, 1)[:12] == losses[:12][::-1] and column(page, 1)[12:] == ["–"] * 4


def test_a_row_highlights_its_curve_and_a_curve_its_row(open_report: Open, sweep: Path) -> None:
    page = open_report(sweep)
    lines = page.locator("path.job.on")
    page.locator(JOBS).nth(2).hover()
    (job,) = highlighted(page)
    assert lines.count() == 1 and lines.get_attribute("data-id") == job
    assert f"{job}: " in page.locator(".readout").first.inner_text()
    page.locator("h1").hover()
    assert highlighted(page) == [] and lines.count() == 0
    page.locator(".plot .u-over").first.hover(position={"x": 900, "y": 222})
    (near,) = highlighted(page)
    assert near.startswith("job ")
    page.locator(".plot .u-over").first.click(position={"x": 900, "y": 222})
    page.locator("h1").hover()
    assert highlighted(page) == [near]  # a click keeps it
    page.locator("path.target").first.dispatch_event("mouseenter")
    assert len(highlighted(page)) in (1, 2)


def test_a_search_shows_its_rungs_and_where_trials_were_stopped(open_report: Open, tmp_path: Path) -> None:
    searched = write_search(tmp_path / "s")
    page = open_report(searched.folder)
    assert page.locator("h1").inner_text() == "s\n✓\nfinished"
    rungs = page.locator("section.table:has(#rungs-title) tbody tr")
    assert rungs.evaluate_all("rows => rows.map((row) => row.cells[0].textContent)") == ["10", "30", "90 (end)"]
    assert page.get_by_text("stopped at a rung").count() == 1
    (searched.folder / "search.jsonl").rename(tmp_path / "search.jsonl")
    without = inked(open_report(searched.folder), "canvas")
    assert inked(page, "canvas") > without + 200  # lines of rungs, and crosses
    assert column(page, 0)[:3] == ["1", "4", "6"]
    page.get_by_role("button", name="in the search").press("Enter")
    assert column(page, 0)[:2] == ["7", "8"] and column(page, 0)[-1] == "1"  # "diverged", "failed", "to its end"
    page.get_by_text("9 entries").click()
    reason = "stopped at 10: place 3 of 8, valid loss 1.2000; those up to 1.1000 continued"
    assert page.get_by_text(reason).is_visible()
    page.locator("section.table:has(#trials-title)").get_by_role("button", name="at 30").press("Enter")
    rows = page.locator("section.table:has(#trials-title) tbody tr")
    assert rows.evaluate_all("rows => rows.map((row) => row.cells[0].textContent)")[:2] == ["1", "4"]


def test_a_curve_that_blows_up_is_cut_off_and_the_log_scale_shows_it(open_report: Open, tmp_path: Path) -> None:
    searched = write_search(tmp_path / "s")
    searched.train(0, {5: 90.0, 10: 80.0}, "stopped")
    page = open_report(searched.folder)
    note = page.get_by_text("1 curve goes above 2, where the chart ends").first
    assert note.is_visible()
    page.get_by_role("button", name="log scale").first.click()
    assert not note.is_visible()


def test_rows_are_reached_and_kept_highlighted_by_keys(open_report: Open, sweep: Path) -> None:
    page = open_report(sweep)
    rows = page.locator(JOBS)
    rows.first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert highlighted(page) == [rows.nth(1).get_attribute("data-id")]
    assert rows.nth(1).get_attribute("aria-selected") == "true"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.id") == rows.last.get_attribute("data-id")
    page.keyboard.press("Escape")
    assert rows.nth(1).get_attribute("aria-selected") == "false"


def test_the_arrow_keys_go_from_the_best_curve_to_the_next(open_report: Open, sweep: Path) -> None:
    page = open_report(sweep)
    best, second = (page.locator(JOBS).nth(i).get_attribute("data-id") for i in range(2))
    page.locator(".plot").first.focus()
    page.keyboard.press("ArrowDown")
    assert highlighted(page) == [best]
    page.keyboard.press("ArrowDown")
    assert highlighted(page) == [second]


def test_the_theme_follows_the_system_until_it_is_chosen(open_report: Open, sweep: Path) -> None:
    page = open_report(sweep, scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    button = page.get_by_role("button", name="theme")
    button.click()
    assert button.inner_text() == "theme: light" and page.evaluate(background) != dark
    button.click()
    button.click()
    assert button.inner_text() == "theme: auto" and page.evaluate(background) == dark


@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_fits_its_window(open_report: Open, sweep: Path, width: int) -> None:
    page = open_report(sweep, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    unnamed = page.locator("button, a, [tabindex='0'], [role=region]").evaluate_all(
        "all => all.filter((one) => !one.textContent.trim() && !one.getAttribute('aria-label')).length"
    )
    assert unnamed == 0


def test_the_last_axis_of_the_settings_is_inside_the_page(open_report: Open, sweep: Path) -> None:
    page = open_report(sweep)
    assert page.locator(".parallel-box").evaluate("box => box.scrollWidth - box.clientWidth") == 0


def test_hostile_texts_are_shown_and_never_run(open_report: Open, tmp_path: Path) -> None:
    samples = [
        {"step": step, "row": 0, "prompt": HOSTILE, "expected": HOSTILE, "text": HOSTILE, "score": 0.0}
        for step in (0, 40)
    ]
    status = {"state": "failed", "reason": HOSTILE, "parent": HOSTILE}
    folder = tmp_path / "<img src=x onerror=hacked=1>"
    run = run_folders.make_run(folder, samples=samples, status=status, **{"data.system_prompt": HOSTILE})
    page = open_report(run)
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate("[document.scripts.length, document.images.length]") == [3, 0]
    shown = HOSTILE.replace("\u2028", "·").replace("\u202e", "·")
    assert page.locator(".answer pre").first.text_content() == shown
    assert page.locator(".text.bad pre").text_content() == shown
    assert page.locator("h1").text_content().startswith("<img src=x onerror=hacked=1>")
    assert page.locator("#settings-title ~ .scroll").text_content().count("onerror") == 1


def test_code_that_was_smuggled_into_the_markup_is_refused(browser: Any, tmp_path: Path) -> None:
    from runner.reports.html.write import write_report

    page = browser.new_page()
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    file = write_report(run_folders.make_run(tmp_path / "run"))
    file.write_text(file.read_text().replace("</body>", "<script>hacked = 1</script><p onclick='1'></body>"))
    page.goto(file.absolute().as_uri())
    assert page.evaluate("typeof hacked") == "undefined"
    assert any("Content Security Policy" in error for error in errors)
    page.close()


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A sweep in progress, and where its live page is served."""
    monkeypatch.setattr(serve, "REFRESH_SECONDS", 0.05)
    folder = run_folders.make_sweep(tmp_path / "live", {"lora.rank": (2, 4, 8, 16, 32)}, iters=8)
    with ReportServer(LivePage(folder)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, server.url
        server.shutdown()
        thread.join()


def test_a_live_page_shows_new_results_and_keeps_what_the_reader_chose(open_url: Open, live: tuple[Path, str]) -> None:
    folder, url = live
    page = open_url(url, width=375)
    page.get_by_role("button", name="rank").click()
    page.get_by_role("button", name="rank").click()
    page.locator(JOBS).nth(1).click()
    box = page.locator("[data-scroll=jobs]")
    box.evaluate("box => { box.scrollLeft = 60; scrollTo(0, 300); }")
    page.get_by_role("button", name="rank").focus()
    status = folder / "0/status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"best": {"valid_loss": 0.0123, "step": 7}}))
    page.get_by_text("0.0123").first.wait_for()
    assert column(page, 2) == ["32", "16", "8", "4", "2"]
    assert page.locator("tr[aria-selected=true]").get_attribute("data-id") == "job 3"
    assert box.evaluate("box => [box.scrollLeft, scrollY]") == [60, 300]
    assert page.evaluate("document.activeElement.textContent") == "rank"
    assert page.get_by_role("link").count() == 0  # the pages of the jobs are not served
