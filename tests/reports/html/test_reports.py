"""What the pages of runs, sweeps and folders hold, from directories alone."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import run_folders
from evaluated_runs import row_losses, write_run, write_sweep

from runner.common.errors import ConfigError
from runner.common.layout import REPORT
from runner.config.labels import Labels
from runner.reports.html.page import page_json, render
from runner.reports.html.write import make_page, write_report, write_report_or_say_why
from runner.runs.labels import write_labels


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def data_of(path: Path) -> dict[str, Any]:
    return json.loads(page_json(make_page(path)))


def part(data: dict[str, Any], title: str) -> dict[str, Any]:
    return next(part for part in data["parts"] if part.get("title") == title)


def fact(data: dict[str, Any], label: str) -> tuple[str, str]:
    items = next(part for part in data["parts"] if part["kind"] == "facts")["items"]
    return next((item["value"], item["remark"]) for item in items if item["label"] == label)


def table(data: dict[str, Any], title: str) -> list[dict[str, Any]]:
    found = part(data, title)
    titles = [column["title"] for column in found["columns"]]
    return [dict(zip(titles, map(plain, row["cells"]), strict=True)) for row in found["rows"]]


def plain(cell: Any) -> Any:
    return cell["text"] if isinstance(cell, dict) else cell


def test_a_run(tmp_path: Path) -> None:
    run = run_folders.make_run(tmp_path / "outputs/run", samples=run_folders.answers(), **{"lora.rank": 16})
    data = data_of(run)
    assert (data["kind"], data["title"], data["state"]) == ("run", "run", "finished")
    assert fact(data, "valid loss")[0].startswith("2.0000 → 0.5") and fact(data, "time")[0] == "3m03s"
    charts = {chart["title"]: chart for chart in part(data, "Training")["charts"]}
    assert list(charts) == ["Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"]
    assert [curve["name"] for curve in charts["Loss"]["curves"]] == ["train", "valid"]
    valid = charts["Loss"]["curves"][1]["x"]
    assert valid["step"] == list(range(0, 41, 5)) and valid["tokens"] == list(range(0, 4001, 500))
    assert valid["minutes"] == sorted(valid["minutes"]) and valid["minutes"][-1] == pytest.approx(
        4000 / 925 / 60, rel=0.03
    )
    assert {"setting": "lora.rank", "value": "16", "default": "8"} in table(
        data, "Settings that differ from the defaults"
    )
    samples = part(data, "Answers before and after training")["items"]
    assert [item["after"]["score"] for item in samples] == [1, 1, 1, 0, 0, 0] and samples[0]["before"]["score"] == 0
    commands = [item["words"] for item in part(data, "How to continue")["items"]]
    assert "python -m runner repeat=outputs/run lora.rank=32" in commands


def test_the_score_of_validation_rows_leaves_no_gap_in_the_curve_of_their_loss(tmp_path: Path) -> None:
    run = run_folders.make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, "split": "valid", "metric": "exact_match", "score": 0.5}) + "\n")
    valid = part(data_of(run), "Training")["charts"][0]["curves"][1]
    assert valid["x"]["step"] == list(range(0, 41, 5)) and None not in valid["y"]


def test_a_real_run_has_its_checkpoints_its_environment_and_a_page_at_its_end(
    tiny: Any, train: Any, tmp_path: Path
) -> None:
    run = train(tiny(**{"train.iters": 4, "train.eval_every": 2, "checkpoint.every": 2}), tmp_path / "run")
    assert (run / REPORT).stat().st_size > 50_000 and "not written" not in (run / "run.log").read_text()
    data = data_of(run)
    assert [row["step"] for row in table(data, "Checkpoints")] == [2, 4]
    marks = part(data, "Training")["charts"][0]["marks"]
    assert [mark["x"]["step"] for mark in marks] == [2, 4] and sum(mark["strong"] for mark in marks) == 1
    assert "adapters" in next(mark["text"] for mark in marks if mark["strong"])
    recorded = {row["what"]: row["value"] for row in table(data, "Environment")}
    assert {"runner", "mlx", "python", "device"} <= recorded.keys()


def test_a_resume_writes_the_page_again_and_a_failure_to_write_it_is_one_line(
    tiny: Any, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(**{"train.iters": 4, "checkpoint.every": 2})
    run = train(config, tmp_path / "run", stop_at=2)
    assert '"state":"stopped"' in (run / REPORT).read_text()
    os.unlink(run / REPORT)
    (run / REPORT / "in the way").mkdir(parents=True)
    capsys.readouterr()
    train(config, run, resume=run)
    said = [line for line in capsys.readouterr().out.splitlines() if "was not written" in line]
    assert len(said) == 1 and said[0] in (run / "run.log").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("broken", ["status.json", "config.yaml", "metrics.jsonl", "samples.jsonl"])
def test_a_damaged_run_has_a_page(tmp_path: Path, broken: str) -> None:
    run = run_folders.make_run(tmp_path / "run", samples=run_folders.answers())
    (run / broken).write_bytes(b'{"step": "x", "row": [], "split": 3}\n\xff{{{\n')
    assert data_of(run)["kind"] == "run"


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    run = run_folders.make_run(tmp_path / "run", state="failed", status={"reason": "No room\nin /home/bob/x"})
    assert part(data_of(run), "Why it failed")["lines"] == ["No room", "in ~/x"]


def test_a_sweep(tmp_path: Path) -> None:
    sweep = run_folders.make_sweep(tmp_path / "outputs/sweep", run_folders.GRID)
    write_report(sweep / "5")
    data = data_of(sweep)
    assert data["state"] == "finished" and data["lines"][0].startswith("16 jobs: 12 finished, 4 diverged")
    jobs = table(data, "Jobs")
    assert list(jobs[0]) == ["job", "valid loss", "rank", "learning_rate", "best at step", "state", "steps", "time"]
    assert jobs[0]["learning_rate"] == "0.001" and [job["valid loss"] for job in jobs[-4:]] == [None] * 4
    links = {row["cells"][0]["text"]: row["cells"][0]["href"] for row in part(data, "Jobs")["rows"]}
    assert links["5"] == "./5/report.html" and links["6"] is None
    assert len(part(data, "Curves")["charts"][0]["curves"]) == 16
    parallel = part(data, "Settings and result")
    assert [axis["name"] for axis in parallel["axes"]] == ["rank", "learning_rate", "valid loss"]
    assert len(parallel["lines"]) == 12 and parallel["axes"][-1]["flip"] is True
    importance = part(data, "What the settings explain")
    assert importance["items"][0]["name"] == "optimizer.learning_rate" and "clear" in importance["items"][0]["text"]
    assert "4 jobs without a result are left out" in importance["note"]
    failed = table(data, "Jobs that did not finish")
    assert [job["job"] for job in failed] == ["3", "7", "11", "15"]
    assert failed[0]["reason"] == "The loss at step 7 is not finite."
    assert data_of(sweep / "5")["up"]["href"] == "./../report.html"


def test_the_verdict_of_a_sweep_names_the_jobs_that_are_not_distinguishable_from_the_best(tmp_path: Path) -> None:
    for number, level in enumerate((1.004, 1.0, 1.2)):
        rows = {0: row_losses(2), 10: row_losses(level, seed=number)}
        write_run(tmp_path / "sweep" / str(number), rows, lora__rank=2**number)
    data = data_of(write_sweep(tmp_path / "sweep", 3))
    verdict = part(data, "Verdict: validation loss of the same 60 rows")
    assert [row["id"] for row in verdict["rows"]] == ["job 1", "job 0", "job 2"]
    outcomes = [row["outcome"] for row in table(data, verdict["title"])]
    assert outcomes[1].startswith("not distinguishable") and outcomes[2] == "worse"
    assert "not distinguishable from job 1" in verdict["note"]


def test_names_tags_notes_and_where_a_run_comes_from(tmp_path: Path) -> None:
    first = run_folders.make_run(tmp_path / "outputs/2026-11-29/10-00-00")
    status = {"parents": [{"how": "branch", "path": str(first / "checkpoints/step-0000020"), "run_id": None}]}
    second = run_folders.make_run(tmp_path / "outputs/2026-11-29/11-00-00", status=status)
    write_labels(first, Labels("baseline", ("sql", "small"), "The first one.\nToo short."))
    data = data_of(first)
    assert data["title"] == "baseline" and data["tags"] == ["#sql", "#small"]
    assert data["lines"][:3] == ["2026-11-29/10-00-00", "The first one.", "Too short."]
    origin = "branch at 20 of outputs/2026-11-29/10-00-00 (baseline)"
    assert origin in data_of(second)["lines"]
    rows = {row["run"]: row for row in table(data_of(tmp_path / "outputs"), "Runs and sweeps")}
    assert rows["2026-11-29/10-00-00"]["name"] == "baseline #sql #small"
    assert rows["2026-11-29/11-00-00"]["from"] == origin
    sweep = run_folders.make_sweep(tmp_path / "outputs/sweep", {"lora.rank": (2, 4)})
    write_labels(sweep, Labels("ranks", ("sql",)))
    assert (data_of(sweep)["title"], data_of(sweep / "0")["tags"]) == ("ranks", ["#sql"])


def test_too_few_jobs_are_said_to_be_too_few(tmp_path: Path) -> None:
    sweep = run_folders.make_sweep(tmp_path / "sweep", {"lora.rank": (2, 4, 8)})
    importance = part(data_of(sweep), "What the settings explain")
    assert "at least 3 are needed" in importance["note"]
    assert "too few jobs to tell it from chance" in importance["items"][0]["text"]


def test_jobs_that_have_not_begun_and_seeds(tmp_path: Path) -> None:
    sweep = run_folders.make_sweep(tmp_path / "sweep", {"lora.rank": (2, 4), "seed": (0, 1, 2)})
    shutil.rmtree(sweep / "5")
    data = data_of(sweep)
    assert data["state"] == "stopped" and table(data, "Jobs")[-1]["state"] == "not started"
    groups = table(data, "Over seeds")
    assert {group["seeds"] for group in groups} == {"3 of 3", "2 of 2"}


def test_a_folder_links_to_the_pages_below_it(tmp_path: Path) -> None:
    run = run_folders.make_run(tmp_path / "outputs/a:b/run")
    run_folders.make_run(tmp_path / "outputs/other", state="failed", final=0.7, status={"reason": "no <b>room</b>"})
    sweep = run_folders.make_sweep(tmp_path / "outputs/sweep", {"lora.rank": (2, 4)})
    write_report(run)
    write_report(sweep)
    data = data_of(tmp_path / "outputs")
    assert data["title"] == "outputs" and data["lines"] == ["2 runs and 1 sweep, newest first"]
    links = {row["cells"][0]["text"]: row["cells"][0]["href"] for row in part(data, "Runs and sweeps")["rows"]}
    assert links == {"a:b/run": "./a%3Ab/run/report.html", "other": None, "sweep": "./sweep/report.html"}
    notes = [note for row in part(data, "Runs and sweeps")["rows"] for note in row["notes"]]
    assert notes == ["failed: no <b>room</b>"]
    assert {row["run"]: row["steps"] for row in table(data, "Runs and sweeps")}["sweep"] is None  # each job has its own


def test_a_long_run_makes_a_small_page_with_its_peaks(tmp_path: Path) -> None:
    run = run_folders.make_run(tmp_path / "run", iters=5000)
    rows = (run / "metrics.jsonl").read_text()
    peak = '{"step": 5001, "split": "train", "loss": 77.5, "tokens": 500100}\n'
    (run / "metrics.jsonl").write_text(rows + peak)
    assert write_report(run).stat().st_size < 300_000
    loss = part(data_of(run), "Training")["charts"][0]
    shown, total = loss["thinned"]
    assert shown <= 2000 < 5000 < total and max(loss["curves"][0]["y"]) == 77.5


def test_nothing_private_stands_in_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home/alice"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    (tmp_path / "home/alice").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home/alice")
    run = run_folders.make_run(
        tmp_path / "home/alice/outputs/run",
        status={"state": "running", "parent": str(tmp_path / "home/alice/outputs/old/checkpoints/step-0000010")},
        **{"data.path": "/home/alice/data/sql", "data.system_prompt": "${oc.env:HF_TOKEN}"},
    )
    content = re.sub(r"<(script|style)>.*?</\1>", "", write_report(run).read_text(), flags=re.S)
    assert not [word for word in ("alice", str(tmp_path), "hf_secret", "4711") if word in content]
    assert "${oc.env:HF_TOKEN}" in content


def test_a_folder_outside_the_working_directory_is_shown_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = run_folders.make_run(tmp_path / "alice/outputs/run")
    for folder in (run, run.parent):
        content = re.sub(r"<(script|style)>.*?</\1>", "", render(make_page(folder)), flags=re.S)
        assert f"<title>{folder.name} · " in content
        assert not [word for word in ("alice", str(tmp_path)) if word in content]


def test_what_cannot_be_shown_or_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, reason in (("empty", "none below it"), ("missing", "no such folder")):
        with pytest.raises(ConfigError, match=reason):
            make_page(tmp_path / path)
    run = run_folders.make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="there is no folder"):
        write_report(run, tmp_path / "missing/page.html")
    assert write_report_or_say_why(run) is None
    assert "report.html was not written: ConfigError" in str(write_report_or_say_why(tmp_path / "missing"))
