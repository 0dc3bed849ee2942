"""`runner test --all` measures what `runner test` measures of each, and loads a base model once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoints import manifest
from runner.cli.commands import best, load_adapter, test
from runner.cli.commands.adapter_source import find_average
from runner.common.errors import ConfigError
from runner.config.labels import Labels
from runner.runs.labels import write_labels


def measured(capsys: pytest.CaptureFixture[str], *arguments: str, expect: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert test.run([*arguments, "--json"]) == expect
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the base models that are loaded."""
    seen: list[str] = []
    load = load_adapter.load_base_model

    def counted(config: Any) -> Any:
        seen.append(config.path)
        return load(config)

    monkeypatch.setattr(load_adapter, "load_base_model", counted)
    return seen


@pytest.fixture
def run(tiny: Callable, train_once: Callable, tmp_path: Path) -> Path:
    return train_once(tiny(**{"data.metric": "exact_match", "data.max_new_tokens": 4}), tmp_path / "run")


def test_every_kept_checkpoint_is_measured_as_it_is_alone(
    run: Path, capsys: pytest.CaptureFixture[str], loads: list[str]
) -> None:
    table = measured(capsys, str(run), "--all", "--rows", "3")
    assert loads == ["builtin:tiny"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    recorded = {row["step"]: row["loss"] for row in rows if row["split"] == "valid"}
    assert [entry["step"] for entry in table["entries"]] == [4, 8, 12]
    for entry in table["entries"]:
        alone = measured(capsys, entry["adapter"], "--rows", "3")
        assert {name: entry[name] for name in ("loss", "perplexity", "score", "rows")} == {
            name: alone[name] for name in ("loss", "perplexity", "score", "rows")
        }
        assert entry["valid_loss"] == recorded.get(entry["step"])
    top = min(table["entries"], key=lambda entry: entry["valid_loss"] or 9)
    lowest = min(table["entries"], key=lambda entry: entry["loss"])
    assert [entry["is_best"] for entry in table["entries"]] == [entry is top for entry in table["entries"]]
    assert [entry["is_lowest"] for entry in table["entries"]] == [entry is lowest for entry in table["entries"]]
    assert [entry["is_result"] for entry in table["entries"]] == [False, False, True]


def test_the_table_marks_the_best(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert test.run([str(run), "--all", "--split", "valid"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split("  ")[0] == "checkpoint" and "valid loss" in title
    assert [line.split()[0] for line in lines] == ["step-0000004", "step-0000008", "step-0000012"]
    assert lines[-1].endswith("best by valid_loss, the run's result")


def test_the_best_is_the_one_that_best_names_and_the_lowest_loss_is_marked_beside_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:  # as if an earlier checkpoint had been better on the validation rows
        row["loss"] = 0.5 if (row["split"], row["step"]) == ("valid", 8) else row.get("loss")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = run / "checkpoints/step-0000008/manifest.json"
    file.write_bytes(manifest.write(replace(manifest.read(file.read_bytes()), metrics={"valid_loss": 0.5})))
    capsys.readouterr()
    assert best.run([str(run), "--checkpoint"]) == 0
    assert capsys.readouterr().out.strip().endswith("step-0000008")
    assert test.run([str(run), "--all", "--rows", "1"]) == 0
    remarks = [line.rpartition("   ")[2].strip() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert remarks[0].endswith("best by valid_loss") and remarks[1].endswith("lowest test loss, the run's result")


def test_a_result_without_its_checkpoint_has_a_row_and_a_damaged_checkpoint_is_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints/step-0000012/adapters.safetensors").write_bytes(b"x")
    table = measured(capsys, str(run), "--all", expect=5)
    damaged, result = table["entries"][2:]
    assert "step-0000012" in damaged["problem"] and "loss" not in damaged
    assert (result["step"], result["is_result"], result["is_best"]) == (12, True, True)


def test_the_jobs_of_a_sweep_share_a_base_model(
    inline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], loads: list[str]
) -> None:
    settings = ["model=tiny", "data=tiny", "train.iters=4", "train.eval_every=2", "hydra.sweep.dir=sweep"]
    inline("-m", *settings, "lora.rank=2,4", "optimizer.learning_rate=1e-3,1e-2")
    sweep = tmp_path / "sweep"
    (sweep / "3/adapters/adapters.safetensors").unlink()
    table = measured(capsys, str(sweep), "--all")
    assert loads == ["builtin:tiny"]
    for number, entry in enumerate(table["entries"][:3]):
        alone = measured(capsys, str(sweep / str(number)))
        assert (entry["loss"], entry["step"]) == (alone["loss"], alone["step"])
    assert table["entries"][3]["problem"] == "no result: finished"
    assert test.run([str(sweep), "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["job", "rank", "learning_rate"]
    assert [line.split()[1:3] for line in lines[1:]] == [["2", "0.001"], ["2", "0.01"], ["4", "0.001"], ["4", "0.01"]]


def test_what_cannot_be_combined_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--all tests every checkpoint"):
        test.run([str(run), "--all", "--checkpoint", "4"])
    with pytest.raises(ConfigError, match="is neither"):
        test.run([str(run / "adapters"), "--all"])
    with pytest.raises(ConfigError, match="--limit needs --tasks"):
        test.run([str(run), "--limit", "4"])
    with pytest.raises(ConfigError, match="--tasks takes no --all"):
        test.run([str(run), "--all", "--tasks", "a"])


def test_a_run_may_be_given_by_its_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "outputs" / "run"
    named.parent.mkdir()
    run.rename(named)
    write_labels(named, Labels(name="baseline"))
    monkeypatch.chdir(tmp_path)
    assert [entry["step"] for entry in measured(capsys, "baseline", "--all", "--rows", "1")["entries"]] == [4, 8, 12]
    assert [source.step for source in find_average(Path("baseline"), "last:2")] == [8, 12]
