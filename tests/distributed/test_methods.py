"""Every method on several ranks: one curve with one process; and what each rank does with its share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed.conftest import assert_one_curve

WORDS = ("one", "two", "three", "four", "five", "six", "seven")
MEASURES = ("reward", "reward_std", "reward_margin", "reward_chosen", "reward_rejected", "answer_tokens", "kl")
METHODS = {
    "dpo": {"prompt": "twice: {0}", "chosen": "{0} {0}", "rejected": "{1}"},
    "orpo": {"prompt": "twice: {0}", "chosen": "{0} {0}", "rejected": "{1}"},
    "kto": {"prompt": "twice: {0}", "completion": "{0} {0}", "label": True},
    "grpo": {"prompt": "twice: {0}", "completion": "{0} {0}"},
}


def write_rows(folder: Path, template: dict[str, Any]) -> Path:
    """Write rows of different lengths: 11 for training, so that the last batch of an epoch is smaller."""
    folder.mkdir()
    for split, count in (("train", 11), ("valid", 5), ("test", 3)):
        rows = []
        for i in range(count):
            values = WORDS[i % 7] * (1 + i % 3), WORDS[(i + 1) % 7]
            row = {
                key: value.format(*values) if isinstance(value, str) else i % 3 > 0 for key, value in template.items()
            }
            rows.append(json.dumps(row) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return folder


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dpo", 2),
        pytest.param("kto", 4, marks=pytest.mark.long),
        pytest.param("orpo", 4, marks=pytest.mark.long),
        pytest.param("dpo", 4, marks=pytest.mark.long),
        pytest.param("grpo", 2, marks=pytest.mark.long),
        pytest.param("grpo", 4, marks=pytest.mark.long),
    ],
)
def test_a_method_has_one_curve_on_any_number_of_ranks(make_cli, tmp_path, run_ranks, name, count):
    cli = make_cli(tmp_path)
    cli.environment["RUNNER_CACHE"] = str(tmp_path / "cache")
    words = ["model=tiny", "data=folder", f"data.path={write_rows(tmp_path / 'data', METHODS[name])}", f"method={name}"]
    words += ["train.iters=12", "train.batch_size=3", "train.grad_accumulation=2", "train.report_every=1"]
    words += ["train.eval_every=6", "checkpoint.every=6", "train.test=true", "optimizer.learning_rate=1e-3"]
    if name == "grpo":
        words += ["data.metric=exact_match", "method.group_size=4", "method.max_new_tokens=6", "method.beta=0.04"]
    run_ranks(cli, count, *words, "hydra.run.dir=ranks")
    for entry in (tmp_path / "cache").rglob("*.json"):  # what the ranks computed together: reference and baseline
        entry.unlink()
    run_ranks(cli, 1, *words, "hydra.run.dir=alone")
    assert_one_curve(tmp_path / "alone", tmp_path / "ranks")
    measures = [
        # Not the accuracy: while the model is its own reference, it is the sign of a difference of rounding errors.
        [{k: v for k, v in json.loads(line).items() if k in MEASURES} for line in file.open()]
        for file in (tmp_path / "alone" / "metrics.jsonl", tmp_path / "ranks" / "metrics.jsonl")
    ]
    assert any(measures[0])
    for alone, ranks in zip(*measures, strict=True):
        assert ranks == pytest.approx(alone, abs=1e-3)


def test_the_hidden_state_cache_and_accumulation_on_each_ranks_share(make_cli, tmp_path, run_ranks):
    """Rows of frozen blocks are computed by the rank that has them and cached for all on this machine; a micro-batch of
    3 rows leaves one of 4 ranks without a row."""
    cli = make_cli(tmp_path)
    cli.environment["RUNNER_CACHE"] = str(tmp_path / "cache")
    words = ["model=tiny", "data=tiny", "lora.num_layers=2", "train.batch_size=3", "train.grad_accumulation=3"]
    words += ["train.iters=20", "train.eval_every=10", "train.report_every=1", "optimizer.learning_rate=1e-3"]
    [output, *_] = run_ranks(cli, 4, *words, "hydra.run.dir=ranks")
    assert "hidden states of the first 2 blocks are computed once per row" in output
    filled = {path: path.read_bytes() for path in (tmp_path / "cache" / "trunk").rglob("*.bin")}
    assert len(filled) == 4, "states and checksums of two splits"
    [output] = run_ranks(cli, 1, *words, "hydra.run.dir=alone")
    assert_one_curve(tmp_path / "alone", tmp_path / "ranks")
    for path, content in filled.items():
        assert path.read_bytes() == content, "one process finds what the ranks have cached, complete"
