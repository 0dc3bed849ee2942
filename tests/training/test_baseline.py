"""The loss before training is kept between runs, and believed only where it is whole and of the same numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.common import fact_cache, sealed_json
from runner.training import baseline
from runner.training.validate import ValidationResult

pytestmark = pytest.mark.usefixtures("cache")
SHORT = {"train.iters": 1, "checkpoint.every": None}


def before(run: Path) -> float:
    """The validation loss before the first update, as a run has recorded it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(row["loss"] for row in rows if row["split"] == "valid" and row["step"] == 0)


def the_file(cache: Path) -> Path:
    (file,) = (cache / "baselines").iterdir()
    return file


def rewritten(file: Path, loss: object) -> None:
    values = {**json.loads(file.read_text())["values"], "loss": loss}
    file.write_bytes(sealed_json.seal({"values": values}))


def test_a_later_run_takes_what_an_earlier_one_has_computed(
    tiny: Callable, train: Callable, tmp_path: Path, cache: Path
) -> None:
    first = before(train(tiny(**SHORT), tmp_path / "a"))
    file = the_file(cache)
    assert json.loads(file.read_text())["values"]["loss"] == first
    rewritten(file, 1.25)  # so that one sees where the value comes from
    assert before(train(tiny(**SHORT, **{"lora.rank": 4, "seed": 7}), tmp_path / "b")) == 1.25
    for number, other in enumerate(({"train.eval_tokens": 1}, {"lora.dropout": 0.1}, {"data.max_length": 40})):
        assert before(train(tiny(**{**SHORT, **other}), tmp_path / f"c{number}")) != 1.25
    assert before(train(tiny(**SHORT, **{"train.cache_baseline": False}), tmp_path / "d")) == first


@pytest.mark.parametrize("harm", ["cut", "a digit", "not finite", "empty", "a folder", "no text", "brackets", "a pipe"])
def test_what_is_damaged_is_computed_again(
    harm: str, tiny: Callable, train: Callable, tmp_path: Path, cache: Path
) -> None:
    first = before(train(tiny(**SHORT), tmp_path / "a"))
    file = the_file(cache)
    if harm == "cut":
        file.write_text(file.read_text()[:40])
    elif harm == "a digit":
        file.write_text(file.read_text().replace('"loss": ', '"loss": 1'))
    elif harm == "not finite":
        rewritten(file, "nan")
    elif harm == "empty":
        file.write_text("")
    elif harm == "brackets":
        file.write_text("[" * 4096)
    elif harm == "a pipe":
        file.unlink()
        os.mkfifo(file)
    elif harm == "no text":
        file.write_bytes(b"\xff\xfe\x00")
    else:
        file.unlink()
        file.mkdir()
    assert before(train(tiny(**SHORT), tmp_path / "b")) == first


def test_a_cache_folder_that_cannot_be_used_is_no_matter(
    tiny: Callable, train: Callable, tmp_path: Path, cache: Path
) -> None:
    cache.write_text("a file where the folder would be")
    settings = tiny(**SHORT, **{"train.hidden_cache.disk_gb": 0.0})
    assert before(train(settings, tmp_path / "a")) == before(train(settings, tmp_path / "b"))


def test_very_many_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fact_cache, "_MAX_FACTS", 10)
    for number in range(11):
        baseline.load_baseline({"number": number}).store_validation(ValidationResult(1.0, 2, 3, 4.0))
    assert len(list((cache / "baselines").iterdir())) == 10
    assert baseline.load_baseline({"number": 10}).validation == ValidationResult(1.0, 2, 3, 4.0)
    assert baseline.load_baseline({"number": 0}).validation is None


def test_a_long_evaluation_before_training_says_that_it_is_at_work(tiny, train, tmp_path, monkeypatch):
    quick = train(tiny(**{"train.iters": 1, "train.cache_baseline": False}), tmp_path / "quick")
    assert "evaluating" not in (quick / "run.log").read_text()
    monkeypatch.setattr("runner.training.trainer.NOTICE_SECONDS", 0.0)
    slow = train(tiny(**{"train.iters": 6, "train.cache_baseline": False}), tmp_path / "slow")
    assert (slow / "run.log").read_text().count("evaluating 10 rows before training") == 1
    assert (slow / "run.log").read_text().count("evaluating") == 1
