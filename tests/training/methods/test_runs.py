"""Runs of every method: resumed equal to one that never stopped, warm starts, and what they learn."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_equal_runs

from runner.common.errors import CheckpointError, ConfigError, DataError
from runner.config import validation
from runner.config.schema import METHOD_MEASURES, Config
from runner.data.metrics import METRICS

WORDS = ("one", "two", "three", "four", "five", "six", "seven")


def write_rows(folder: Path, make: Callable[[int], dict[str, Any]], **sizes: int) -> Path:
    folder.mkdir()
    for split, count in sizes.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(make(i)) + "\n" for i in range(count)))
    return folder


def pair(i: int) -> dict[str, Any]:
    return {
        "prompt": f"twice: {WORDS[i % 7]}",
        "chosen": f"{WORDS[i % 7]} {WORDS[i % 7]}",
        "rejected": WORDS[(i + 1) % 7] * (1 + i % 2),
    }


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs", pair, train=10, valid=4, test=3)


class HasVowel:
    """A metric that random answers reach now and then."""

    name = "exact_match"

    def score(self, row: dict[str, Any], text: str) -> float:
        return float(any(vowel in text for vowel in "aeiou"))


@pytest.fixture
def config(tiny: Callable[..., Config], pairs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    monkeypatch.setitem(METRICS, "exact_match", HasVowel())

    def make(name: str, **changes: Any) -> Config:
        own = (
            {"data.metric": "exact_match", "method.group_size": 4, "method.max_new_tokens": 5} if name == "grpo" else {}
        )
        common = {"data.path": str(pairs), "train.iters": 6, "train.eval_every": 4, "checkpoint.every": 3}
        common |= {"train.report_every": 2, "train.batch_size": 3, "data.window": 2}
        return tiny(**{"method.name": name, **common, **own, **changes})

    return make


def train_rows(run: Path, split: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split and "loss" in row]


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo", pytest.param("orpo", marks=pytest.mark.long)])
def test_a_stopped_run_ends_equal_after_its_resume(config, train, tmp_path, cache, name):
    changes = {"train.grad_accumulation": 2, "lora.dropout": 0.1, "train.test": True}
    changes |= {"method.beta": 0.04} if name == "grpo" else {}
    whole = train(config(name, **changes), tmp_path / "whole")
    run = train(config(name, **changes), tmp_path / "run", stop_at=3)
    for entry in (cache / "references").rglob("*"):  # what is lost is computed again, to the same digits
        entry.unlink()
    train(config(name, **changes), run, resume=run)
    assert_equal_runs(whole, run)
    measures = {measure for row in train_rows(whole) for measure in row} & {"kl", *METHOD_MEASURES[name]}
    assert measures == set(METHOD_MEASURES[name])
    assert train_rows(whole)[0]["loss"] != train_rows(whole)[-1]["loss"]
    assert train_rows(whole, "test")


def test_a_killed_run_of_pairs_ends_equal(make_cli, tmp_path, pairs):
    cli = make_cli(tmp_path)
    words = ["model=tiny", "data=folder", f"data.path={pairs}", "method=dpo", "train.iters=60", "checkpoint.every=10"]
    words += ["train.eval_every=30", "optimizer.learning_rate=1e-4", "data.max_length=64"]
    cli(*words, "hydra.run.dir=whole")
    process = cli.start(*words, "hydra.run.dir=run")
    os.kill(cli.wait_for(tmp_path / "run", 20, process), signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    cli("resume=run")
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_a_signal_while_answers_are_sampled_abandons_the_update(make_cli, tmp_path, pairs):
    cli = make_cli(tmp_path)
    words = ["model=tiny", "data=folder", f"data.path={pairs}", "method=grpo", "data.metric=exact_match"]
    words += ["train.iters=8", "train.eval_every=8", "train.report_every=1", "data.max_length=64"]
    words += ["method.group_size=4", "method.max_new_tokens=24"]
    cli(*words, "hydra.run.dir=whole")
    process = cli.start(*words, "hydra.run.dir=run")
    os.kill(cli.wait_for(tmp_path / "run", 3, process), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["last_checkpoint"]) == ("stopped", status["step"]) and status["step"] < 8
    cli("resume=run")
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_dpo_prefers_the_better_answers(config, train, tmp_path):
    run = train(config("dpo", **{"train.iters": 20, "optimizer.learning_rate": 1e-3}), tmp_path / "run")
    first, *_, last = train_rows(run, "valid")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)  # log 2: the model is its own reference
    assert first["reward_accuracy"] == 0.5  # all rewards are equal
    assert last["loss"] < 0.5 and last["reward_accuracy"] == 1 and last["reward_margin"] > 0.5
    [losses, *_] = [json.loads(line) for line in (run / "row_losses.jsonl").read_text().splitlines()]
    assert len(losses["losses"]) == 4 and losses["tokens"] == [1] * 4
    assert "data   valid: 4 pairs of answers, " in (run / "run.log").read_text()


def test_answers_with_higher_rewards_become_more_likely(config, train, tmp_path):
    # On the embedding, which is this model's head as well: what the blocks learn in so few updates hardly moves its
    # probabilities, and by how much depends on the device's last digits.
    changes = {"train.iters": 10, "optimizer.learning_rate": 2e-2, "train.batch_size": 4, "method.group_size": 8}
    changes |= {"lora.keys": ["embed_tokens"], "train.report_every": 2, "train.eval_every": 10}
    run = train(config("grpo", **changes), tmp_path / "run")
    rewards = [row["reward"] for row in train_rows(run)]
    assert rewards[-1] > 0.9 and rewards[-1] > 2 * rewards[0], rewards
    assert [row["reward"] for row in train_rows(run, "valid")] == [0, 1]
    assert [row["loss"] for row in train_rows(run)] == pytest.approx([1 - reward for reward in rewards])


def test_equal_rewards_change_nothing(config, train, tmp_path, monkeypatch):
    monkeypatch.setattr(HasVowel, "score", lambda *_: 1.0)
    changes = {"optimizer.weight_decay": 0.0, "train.iters": 2}
    run = train(config("grpo", **changes), tmp_path / "run")
    assert [row["grad_norm"] for row in train_rows(run)] == [0.0]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_the_reference_of_a_warm_start_is_the_adapter_that_it_starts_from(config, train, tmp_path, cache):
    start = train(config("sft", **{"train.iters": 3}), tmp_path / "start")
    settings = config("dpo", adapter=str(start / "adapters"))
    whole = train(settings, tmp_path / "whole")
    first = train_rows(whole, "valid")[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    run = train(settings, tmp_path / "run", stop_at=3)
    for entry in (cache / "references").rglob("*"):
        entry.unlink()
    adapter = start / "adapters" / "adapters.safetensors"
    kept = adapter.read_bytes()
    adapter.write_bytes((start / "checkpoints" / "step-0000003" / "adapters.safetensors").read_bytes())
    other = train(config("sft", **{"train.iters": 3, "seed": 1}), tmp_path / "other")
    adapter.write_bytes((other / "adapters" / "adapters.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="has other weights than when the run began"):
        train(settings, run, resume=run)
    adapter.write_bytes(kept)
    train(settings, run, resume=run)
    assert_equal_runs(whole, run)
    with pytest.raises(
        CheckpointError, match="was trained with an adapter as the reference of method=dpo: name the one"
    ):
        train(config("dpo"), tmp_path / "branch", resume=whole / "checkpoints/step-0000003")


def test_a_branch_has_the_reference_of_its_run(make_cli, tmp_path, pairs):
    cli = make_cli(tmp_path)
    words = [
        "model=tiny",
        "data=folder",
        f"data.path={pairs}",
        "data.max_length=64",
        "checkpoint.every=2",
        "lora.rank=4",
    ]
    cli(*words, "method=sft", "train.iters=2", "optimizer.learning_rate=1e-3", "hydra.run.dir=start")
    cli(*words, "method=dpo", "adapter=start/adapters", "train.iters=4", "train.report_every=1", "hydra.run.dir=run")
    cli("resume=run/checkpoints/step-0000002", "hydra.run.dir=branch")
    assert_equal_runs(tmp_path / "run", tmp_path / "branch")


def test_what_a_method_cannot_use_is_refused(config, tiny, train, tmp_path):
    with pytest.raises(ConfigError, match=r"method.beta is not used by method=sft; it belongs to method=dpo and"):
        tiny(**{"method.beta": 0.2})
    with pytest.raises(ConfigError, match="method=grpo needs data.metric"):
        tiny(**{"method.name": "grpo"})
    with pytest.raises(ConfigError, match="method=dpo compares answers only: data.mask_prompt=false"):
        config("dpo", **{"data.mask_prompt": False})
    with pytest.raises(DataError, match="no pair of answers"):
        train(tiny(**{"method.name": "dpo"}), tmp_path / "run")
    with pytest.raises(DataError, match="'label' is missing: method=kto needs true for a good answer"):
        train(tiny(**{"method.name": "kto"}), tmp_path / "run2")
    validation.validate(config("kto"))
