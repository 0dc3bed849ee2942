"""The results of a sweep are ranked by its objective, and a job that failed early has its reason."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from runner.reports.screen import Screen
from runner.reports.sweep_results import print_sweep_results, read_sweep_results, results_csv, results_svg
from runner.runs.sweep_manifest import SweepJob, SweepManifest


@pytest.fixture
def manifest(tmp_path: Path) -> SweepManifest:
    """A sweep of five jobs: three finished, one diverged, one without a folder."""
    ranks = enumerate((2, 4, 8, 16, 32))
    jobs = [SweepJob(number, str(number), ("model=tiny", f"lora.rank={rank}")) for number, rank in ranks]
    manifest = SweepManifest(tmp_path, jobs=jobs)
    for number, loss in enumerate((3.0, 1.0, 2.0, 0.5)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 0\n")
        state = "diverged" if number == 3 else "finished"
        status = {"state": state, "step": 10, "iters": 10, "best": {"valid_loss": loss, "step": 5}}
        (folder / "status.json").write_text(json.dumps(status))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 5, "split": "valid", "loss": loss}) + "\n")
    return manifest


def test_jobs_are_ranked_by_the_objective_with_those_without_one_last(manifest: SweepManifest) -> None:
    results = read_sweep_results(manifest, {4: "no such module"})
    assert [result.job.number for result in results.jobs] == [1, 2, 0, 3, 4]
    assert [result.objective for result in results.jobs] == [1.0, 2.0, 3.0, None, None]
    assert results.failed == 2
    assert results.jobs[-1].run.state == "failed" and results.jobs[-1].run.reason == "no such module"


def test_the_direction_of_the_objective_counts(manifest: SweepManifest) -> None:
    config = "objective: {metric: valid_loss, direction: maximize}\n"
    (manifest.folder / "0/config.yaml").write_text(config)
    results = read_sweep_results(manifest, {})
    assert [result.job.number for result in results.jobs][:3] == [0, 2, 1]


def test_table_csv_and_curves_name_the_settings_that_differ(manifest: SweepManifest) -> None:
    results = read_sweep_results(manifest, {})
    rows = list(csv.DictReader(io.StringIO(results_csv(results))))
    assert [row["lora.rank"] for row in rows] == ["4", "8", "2", "16", "32"]
    assert rows[0]["objective"] == "1.0" and rows[-1]["state"] == "not started" and "model" not in rows[0]
    assert results_svg(results).count("<polyline") == 4
    out = io.StringIO()
    print_sweep_results(results, Screen(out))
    assert "lora.rank  state" in out.getvalue() and "\nfinish      python" in out.getvalue()
