"""The loss before training is cached between runs that compute the same, and a damaged entry is computed again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runner.common import result_cache, sealed_json
from runner.models.device import on_cpu
from runner.training import baseline
from runner.training.evaluate import EvaluatedRows, EvaluationResult

pytestmark = pytest.mark.usefixtures("cache")
SHORT = {"train.iters": 1, "checkpoint.every": None}


def baseline_loss(run: Path) -> float:
    """Return the validation loss before the first update from the rows of `run`."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row["loss"] for row in rows if row["split"] == "valid" and row["step"] == 0)


def cache_entry(cache: Path) -> Path:
    (file,) = (cache / "baselines").iterdir()
    return file


def rewrite(file: Path, loss: object) -> None:
    values = {**json.loads(file.read_text())["values"], "loss": loss}
    file.write_bytes(sealed_json.seal({"values": values}))


def test_a_run_reuses_the_loss_that_an_equal_computation_cached(
    tiny: Callable, train: Callable, tmp_path: Path, cache: Path
) -> None:
    first = baseline_loss(train(tiny(**SHORT), tmp_path / "a"))
    file = cache_entry(cache)
    assert json.loads(file.read_text())["values"]["loss"] == first
    rewrite(file, 1.25)  # shows where the value comes from
    assert baseline_loss(train(tiny(**SHORT, **{"lora.rank": 4, "seed": 7}), tmp_path / "b")) == 1.25
    others: list[dict[str, object]] = [{"train.eval_tokens": 1}, {"data.max_length": 40}]
    others += [{"lora.dropout": 0.1}] if on_cpu() else []  # which the CPU engine does not compute
    for number, changes in enumerate(others):
        assert baseline_loss(train(tiny(**{**SHORT, **changes}), tmp_path / f"c{number}")) != 1.25
    assert baseline_loss(train(tiny(**SHORT, **{"train.cache_baseline": False}), tmp_path / "d")) == first


def test_a_cached_baseline_gives_the_same_losses_of_rows_and_one_without_them_is_computed_again(
    tiny: Callable, train: Callable, tmp_path: Path, cache: Path
) -> None:
    def losses(name: str) -> bytes:
        return (train(tiny(**SHORT), tmp_path / name) / "row_losses.jsonl").read_bytes()

    first = losses("a")
    file = cache_entry(cache)
    whole = file.read_bytes()
    assert losses("b") == first
    assert file.read_bytes() == whole
    values = json.loads(whole)["values"]
    tampered = {**values, "rows": {**values["rows"], "losses": [1.0] * len(values["rows"]["losses"])}}
    file.write_bytes(sealed_json.seal({"values": tampered}))  # shows where they come from
    assert losses("c") != first
    broken = [{**values, "rows": rows} for rows in ({"losses": [1.0], "tokens": []}, {"losses": "x", "tokens": []}, 3)]
    for number, old in enumerate([{name: values[name] for name in values if name != "rows"}, *broken]):
        file.write_bytes(sealed_json.seal({"values": old}))
        assert losses(f"d{number}") == first
        assert json.loads(file.read_bytes())["values"] == values | {
            "seconds": json.loads(file.read_bytes())["values"]["seconds"]
        }


@pytest.mark.parametrize(
    "damage", ["cut", "a digit", "not finite", "empty", "a folder", "no text", "brackets", "a pipe"]
)
def test_a_damaged_entry_is_computed_again(
    damage: str, tiny: Callable, train: Callable, tmp_path: Path, cache: Path
) -> None:
    first = baseline_loss(train(tiny(**SHORT), tmp_path / "a"))
    file = cache_entry(cache)
    if damage == "cut":
        file.write_text(file.read_text()[:40])
    elif damage == "a digit":
        file.write_text(file.read_text().replace('"loss": ', '"loss": 1'))
    elif damage == "not finite":
        rewrite(file, "nan")
    elif damage == "empty":
        file.write_text("")
    elif damage == "brackets":
        file.write_text("[" * 4096)
    elif damage == "a pipe":
        file.unlink()
        os.mkfifo(file)
    elif damage == "no text":
        file.write_bytes(b"\xff\xfe\x00")
    else:
        file.unlink()
        file.mkdir()
    assert baseline_loss(train(tiny(**SHORT), tmp_path / "b")) == first


def test_an_unusable_cache_folder_does_not_fail_the_run(
    tiny: Callable, train: Callable, tmp_path: Path, cache: Path
) -> None:
    cache.write_text("a file instead of the folder")
    settings = tiny(**SHORT, **{"train.hidden_cache.disk_gb": 0.0})
    assert baseline_loss(train(settings, tmp_path / "a")) == baseline_loss(train(settings, tmp_path / "b"))


def test_old_entries_are_evicted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_cache, "_MAX_RESULTS", 10)
    for number in range(11):
        entry = baseline.load_baseline({"number": number})
        entry.validation = EvaluationResult(
            1.0, 2, 3, 4.0, EvaluatedRows(np.arange(2), np.array([0.5, 1.5]), np.array([1, 1]))
        )
        entry.store()
    assert len(list((cache / "baselines").iterdir())) == 10
    last = baseline.load_baseline({"number": 10}).validation
    assert last is not None and (last.loss, last.supervised, last.tokens, last.seconds) == (1.0, 2, 3, 4.0)
    assert last.rows.losses.tolist() == [0.5, 1.5] and last.rows.tokens.tolist() == [1, 1]
    assert baseline.load_baseline({"number": 0}).validation is None


def test_the_losses_of_many_rows_are_found_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    monkeypatch.setattr(baseline, "MAX_ROWS", 10_000)
    for count in (10_000, 10_001):
        # Of many characters each.
        losses, tokens = np.exp(random.normal(0, 20, count)), random.integers(10**8, 10**9, count)
        rows = EvaluatedRows(np.arange(count), losses, tokens)
        entry = baseline.load_baseline({"rows": count})
        entry.validation = EvaluationResult(1.5, 2, 3, 4.0, rows)
        entry.store()
        found = baseline.load_baseline({"rows": count}).validation
        assert found is not None and found.loss == 1.5
        kept = count if count <= baseline.MAX_ROWS else 0  # more are not recorded in row_losses.jsonl either
        assert found.rows.losses == pytest.approx(rows.losses[:kept], rel=1e-5)
        assert found.rows.tokens.tolist() == rows.tokens[:kept].tolist()
    monkeypatch.setattr(baseline, "MAX_ROWS", 4_000)  # more than is expected is not parsed
    assert baseline.load_baseline({"rows": 10_000}).validation is None


def test_a_long_evaluation_before_training_is_announced(tiny, train, tmp_path, monkeypatch):
    quick = train(tiny(**{"train.iters": 1, "train.cache_baseline": False}), tmp_path / "quick")
    assert "evaluating" not in (quick / "run.log").read_text()
    monkeypatch.setattr("runner.training.trainer.NOTICE_SECONDS", 0.0)
    slow = train(tiny(**{"train.iters": 6, "train.cache_baseline": False}), tmp_path / "slow")
    assert (slow / "run.log").read_text().count("evaluating 10 rows before training") == 1
    assert (slow / "run.log").read_text().count("evaluating") == 1
