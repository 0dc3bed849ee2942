"""`runner test` gives the loss that mlx-lm's own evaluation gives, and that the run itself recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.tuner.datasets import CacheDataset, create_dataset
from mlx_lm.tuner.trainer import evaluate

from runner.cli.commands import adapter_source, stored_settings, test
from runner.cli.commands.load_adapter import load_adapter
from runner.common.errors import ConfigError, DataError


def run_test(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert test.run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def run(tiny: Callable, train_once: Callable, tmp_path: Path) -> Path:
    changes = {"train.test": True, "train.eval_batches": 1, "data.metric": "exact_match", "data.max_new_tokens": 4}
    return train_once(tiny(**changes), tmp_path / "run")


def write_split(folder: Path, name: str, rows: list[dict[str, str]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("kind", ["text", "completions"])
def test_the_loss_equals_mlx_lms_evaluation_on_rows_of_equal_length(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    # The tokenizer has a token a byte. Rows of one length need no padding, of which mlx-lm trains a token a row.
    sentences = [f"{i:02d} grey owls flew over the {i * 7 % 90:02d} hills" for i in range(12)]
    if kind == "text":
        rows = [{"text": text} for text in sentences]
    else:
        rows = [{"prompt": text[:20], "completion": text[20:]} for text in sentences]
    data = write_split(tmp_path / "data", "test", rows)
    ours = run_test(capsys, str(run), f"data.path={data}", "train.batch_size=3")
    source = adapter_source.find_adapter(run)
    loaded = load_adapter(source, stored_settings.read_settings(run), log=print)
    dataset = CacheDataset(
        create_dataset(rows, loaded.base.tokenizer, SimpleNamespace(mask_prompt=kind == "completions"))
    )
    (length,) = {len(dataset[i][0]) for i in range(len(rows))}
    theirs = evaluate(loaded.base.model, dataset, batch_size=3, num_batches=-1, max_seq_length=length)
    assert ours["loss"] == pytest.approx(theirs, abs=1e-5)
    assert ours["perplexity"] == pytest.approx(math.exp(ours["loss"]))
    assert ours["rows"] == 12


def test_the_loss_is_the_one_that_the_run_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    recorded = {row["split"]: row["loss"] for row in rows}
    assert run_test(capsys, str(run), "train.eval_batches=1")["loss"] == recorded["test"]
    valid = run_test(capsys, str(run), "--split", "valid", "train.eval_batches=1", "--checkpoint", "last")
    assert valid["loss"] == recorded["valid"]


def test_all_rows_count_for_any_eval_batches_and_batch_size(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [run_test(capsys, str(run), f"train.batch_size={size}") for size in (1, 3, 50)]
    assert len({row["supervised_tokens"] for row in found}) == 1
    few = run_test(capsys, str(run), "train.eval_batches=1")
    assert [row["rows"] for row in (*found, few)] == [10, 10, 10, 4]
    assert few["supervised_tokens"] < found[0]["supervised_tokens"]
    assert max(row["loss"] for row in found) - min(row["loss"] for row in found) < 1e-5


def test_a_checkpoint_gives_another_loss_than_the_result(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = run_test(capsys, str(run / "checkpoints" / "step-0000004"))
    assert early["step"] == 4
    assert early["loss"] > run_test(capsys, str(run))["loss"]


def test_the_metric_scores_as_many_rows_as_asked_and_shows_three(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_test(capsys, str(run), "--rows", "5")
    assert (found["metric"], len(found["answers"])) == ("exact_match", 5)
    assert found["score"] == sum(answer["score"] for answer in found["answers"]) / 5
    assert test.run([str(run), "--rows", "5"]) == 0
    out = capsys.readouterr().out
    assert "exact_match on 5 held-out rows" in out
    assert out.count("expected") == out.count("[right]") + out.count("[wrong]") == 3
    assert "metric" not in run_test(capsys, str(run))


def test_options_may_stand_before_and_after_settings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run_test(capsys, "--split", "valid", str(run), "train.batch_size=2")
    assert one["loss"] == run_test(capsys, str(run), "train.batch_size=2", "--split", "valid")["loss"]


def test_invalid_arguments_are_refused_before_a_model_is_loaded(run: Path, tmp_path: Path) -> None:
    data = write_split(tmp_path / "data", "train", [{"text": "a"}])
    with pytest.raises(DataError, match=r"has no test split.*--split valid"):
        test.run([str(run), f"data.path={data}"])
    with pytest.raises(ConfigError, match="needs a metric"):
        test.run([str(run), "data.metric=null", "--rows", "3"])
    with pytest.raises(ConfigError, match="--rows -2"):
        test.run([str(run), "--rows", "-2"])
    with pytest.raises(ConfigError, match=r"runner test: .*RUN"):
        test.run([])
