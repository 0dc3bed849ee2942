"""`runner best`: one path on standard output, or one sentence and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from runner.cli.commands import best, ls
from runner.common.errors import ConfigError


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Runs as their directories describe them: no adapter, only what a listing reads."""
    monkeypatch.chdir(tmp_path)

    def make(name, loss, rank=8, state="finished", rows=(), objective=None, tags=(), method="sft"):
        path = tmp_path / "outputs" / name
        (path / "checkpoints").mkdir(parents=True)
        config = {"lora": {"rank": rank}, "train": {"iters": 9}, "objective": {"metric": objective or "valid_loss"}}
        config["method"] = {"name": method}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        status = {"state": state, "step": 9, "run_id": name, "best": {"valid_loss": loss, "step": 3}}
        (path / "status.json").write_text(json.dumps(status))
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (path / "labels.json").write_text(json.dumps({"tags": list(tags)}))

    make("d/a", 0.5, tags=["x"], rows=[{"step": 9, "split": "test", "loss": 0.2}])
    make("d/b", 0.3, rank=16)
    make("d/c", 0.1, state="diverged")
    make("s/0", 0.4, objective="score", rows=[{"step": 9, "split": "test", "score": 0.1}])
    make("s/1", 0.9, objective="score", rows=[{"step": 9, "split": "test", "score": 0.7}], tags=["x"])
    make("m/sft", 0.5)
    make("m/dpo", 0.7, method="dpo")
    (tmp_path / "outputs/s/multirun.yaml").write_text("{}\n")
    return tmp_path / "outputs"


def printed(capsys, *arguments):
    assert best.run(list(arguments)) == 0
    return capsys.readouterr().out


def test_only_the_path_is_printed(outputs, capsys):
    assert printed(capsys, "outputs/d") == "outputs/d/b\n"
    assert printed(capsys, "outputs/s") == "outputs/s/1\n"  # by its own objective
    assert printed(capsys, "outputs/d", "lora.rank<=8") == "outputs/d/a\n"
    assert printed(capsys, "--by", "valid_loss") == "outputs/d/b\n"
    assert printed(capsys, "--by", "valid_loss", "--tag", "x") == "outputs/d/a\n"
    assert printed(capsys, "--by", "test_loss") == "outputs/d/a\n"
    assert printed(capsys, "--by", "score", "outputs") == "outputs/s/1\n"
    document = json.loads(printed(capsys, "outputs/d", "--json"))
    assert document["value"] == 0.3 and Path(document["path"]).name == "b"


def test_losses_of_different_methods_are_noted(outputs, capsys):
    assert best.run(["outputs/m"]) == 0
    out, err = capsys.readouterr()
    assert out == "outputs/m/sft\n"
    assert err == "The valid_loss of dpo and sft are on different scales: --by score, or method=dpo.\n"
    assert best.run(["outputs/m", "method=dpo"]) == 0
    assert capsys.readouterr() == ("outputs/m/dpo\n", "")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], r"different objectives \(score, valid_loss\): choose one with --by"),
        (["outputs/d", "lora.rank>99"], "no run that passes the filters has a valid_loss"),
        (["outputs/d", "--by", "score"], "no run has a score"),
        (["outputs/d", "--by", "lora.rank"], "--by lora.rank: must be one of valid_loss"),
        (["outputs/d", "--checkpoint"], "none of its checkpoints was evaluated"),
        (["outputs/dd"], "no such folder, and .* Did you mean 'd'"),
        (["outputs/d", "outputs/s"], "nor the only PATH"),
    ],
)
def test_without_one_there_is_a_sentence(outputs, arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        best.run(arguments)


def test_ls_lists_of_a_sweep_the_jobs_that_pass(outputs, capsys):
    assert ls.run(["valid_loss<0.45", "--sort", "-valid_loss", "state!=diverged"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["outputs/s", "0", "outputs/d/b"] and "1 of 2 jobs" in lines[1]
    assert ls.run(["outputs", "score>=0.1", "--sort", "score", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["path"].endswith("/s") for entry in document["entries"]] == [True]
    assert ls.run(["score>0.5", "--sort=score"]) == 0
    titles, _, job = capsys.readouterr().out.splitlines()
    assert "score" in titles.split() and "0.7000" in job and "#x" in job
    assert ls.run(["valid_loss>100"]) == 0
    assert capsys.readouterr().out == "None of the 6 runs and sweeps below outputs passes the filters.\n"
