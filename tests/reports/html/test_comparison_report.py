"""The page of a comparison and the verdict on that of a sweep: what they show, and that a browser draws them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluated_runs import row_losses, write_run, write_sweep

from runner.common.errors import ConfigError
from runner.reports.comparison import compare
from runner.reports.html.comparison_report import comparison_report
from runner.reports.html.page import page_json
from runner.reports.html.sweep_report import sweep_report
from runner.reports.html.write import write_comparison
from runner.runs.find import read_sweep
from runner.runs.inspect import read_run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two settings of two seeds each."""
    for number, (rank, seed) in enumerate((rank, seed) for rank in (4, 8) for seed in (0, 1)):
        losses = {0: row_losses(2), 10: row_losses(1.0 + rank / 20, seed=number), 20: row_losses(1.5, seed=number)}
        write_run(tmp_path / "sweep" / str(number), losses, lora__rank=rank, seed=seed)
    return write_sweep(tmp_path / "sweep", 4)


def parts(data: str) -> list[dict[str, Any]]:
    return json.loads(data)["parts"]


def test_the_page_of_a_comparison_has_the_verdict_the_results_and_the_curves(sweep: Path) -> None:
    verdict, results, settings, curves = parts(page_json(comparison_report(compare(read_sweep(sweep).runs))))
    assert verdict["title"] == "Verdict: validation loss of the same 60 rows"
    assert [row["cells"][0] for row in verdict["rows"]] == ["0, 1", "2, 3"]
    assert [row["cells"][1] for row in verdict["rows"]] == ["best: 1.2000", "worse"]
    assert verdict["note"].startswith("Jobs 2, 3 are worse than jobs 0, 1 by more than noise on these 60 rows (diff")
    titles = [column["title"] for column in results["columns"]]
    assert [column["title"] for column in settings["columns"]] == ["job", "state", "rank", "seed"]
    assert titles[:2] == ["job", "valid loss"] and "test loss" not in titles
    row = dict(zip(titles, results["rows"][0]["cells"], strict=True))
    assert row["valid loss"] == pytest.approx(1.2, abs=1e-5) and row["at step"] == 10
    assert row["tokens"] == 2000 and row["tokens a second"] == 100 and row["in updates"]["text"] == "20s"
    curve = curves["charts"][0]["curves"][0]
    assert curve["x"].pop("minutes in updates") == pytest.approx([0, 1 / 6, 1 / 3], abs=1e-4)
    assert curve["x"] == {"step": [0, 10, 20], "tokens": [0, 1000, 2000]}
    assert [curve["id"] for curve in curves["charts"][0]["curves"]] == [row["id"] for row in results["rows"]]


def test_many_settings_that_differ_are_one_column_that_a_page_has_room_for(tmp_path: Path) -> None:
    changes = {"lora__rank": 16, "schedule__warmup": 10, "train__batch_size": 2, "optimizer__learning_rate": 1e-5}
    paths = [
        write_run(tmp_path / "a", {10: row_losses(1.0)}, data__path="builtin:text_to_sql"),
        write_run(tmp_path / "b", {10: row_losses(1.0)}, train__grad_accumulation=4, train__clip_norm=0.5, **changes),
    ]
    *_, settings, _ = parts(page_json(comparison_report(compare([read_run(path) for path in paths]))))
    assert [column["title"] for column in settings["columns"]] == ["run", "directory", "state", "settings that differ"]
    assert "rank=16" in settings["rows"][1]["cells"][3] and "grad_accumulation=4" in settings["rows"][1]["cells"][3]


def test_runs_that_cannot_be_judged_have_a_page_that_says_why(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, {10: row_losses(1.0)}, rows=None, lora__rank=len(name)) for name in ("a", "bc")]
    verdict, *_ = parts(page_json(comparison_report(compare([read_run(run) for run in runs]))))
    assert verdict["kind"] == "text"
    assert "the run is of an earlier version" in " ".join(verdict["lines"])


def test_the_page_of_a_sweep_has_the_verdict(sweep: Path) -> None:
    titles = [part.get("title") for part in parts(page_json(sweep_report(read_sweep(sweep))))]
    assert "Verdict: validation loss of the same 60 rows" in titles


def test_a_folder_in_place_of_the_file_is_refused(sweep: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder: name a file"):
        write_comparison(compare(read_sweep(sweep).runs), sweep)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_a_browser_draws_the_comparison_over_each_axis(
    sweep: Path, tmp_path: Path, open_url: Callable[..., Any], width: int, scheme: str
) -> None:
    other = write_run(tmp_path / "other", {0: row_losses(2), 10: row_losses(1.4)}, lora__rank=16)
    runs = [*read_sweep(sweep).runs, read_run(other)]
    page = open_url(write_comparison(compare(runs), tmp_path / "c.html").as_uri(), width=width, scheme=scheme)
    assert page.locator("h1").inner_text() == "5 runs compared"
    for axis in ("tokens", "minutes in updates"):
        page.get_by_role("radio", name=axis, exact=True).check()
        assert page.locator(".plot canvas").count() == 1
    tables = page.locator(".scroll").evaluate_all("all => all.map((one) => one.scrollWidth - one.clientWidth)")
    assert len(tables) == 3 and (width < 1280 or tables == [0, 0, 0])
    outcome = page.locator("section.table").first.locator("tbody tr").first.locator("td").nth(1).bounding_box()
    assert outcome["x"] + outcome["width"] <= width
    assert re.search("more than noise|not distinguishable", page.locator("main").inner_text())
