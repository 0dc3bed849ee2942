"""`runner show`: the page of a run and of a sweep, also of damaged ones; the commands that it names work."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.cli.commands import COMMANDS, show
from runner.common.errors import ConfigError
from runner.config.schema import Config


@pytest.fixture
def trained(
    tiny: Callable[..., Config], train_once: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run of the tiny model with generated answers, below the working directory."""
    monkeypatch.chdir(tmp_path)
    settings = tiny(**{"lora.rank": 4, "optimizer.learning_rate": 2e-3, "data.metric": "exact_match"})
    settings.data.metric_rows, settings.data.max_new_tokens, settings.train.test = 2, 4, True
    return train_once(settings, tmp_path / "run")


def page(capsys: pytest.CaptureFixture[str], path: Path | str, *arguments: str) -> str:
    """What `runner show` prints."""
    assert show.run([str(path), *arguments]) == 0
    return capsys.readouterr().out


def status(path: Path, **changes: Any) -> None:
    """Change what the run's status says."""
    told = json.loads((path / "status.json").read_text())
    (path / "status.json").write_text(json.dumps(told | changes))


def test_the_page_of_a_finished_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page(capsys, "run")
    lines = text.splitlines()
    assert lines[0] == "run" and lines[1].startswith("finished at step 12 of 12")
    assert "exact_match 0.0% -> " in text and "on 2 test rows" in text and "test loss" in text
    settings = text[text.index("settings that differ") : text.index("\nloss\n")]
    named = [line.split()[0] for line in settings.splitlines()[2:] if line]
    assert {"model.path", "data.path", "lora.rank", "optimizer.learning_rate", "train.iters"} <= set(named)
    assert not {"lora.scale", "optimizer.betas", "lora.dropout", "seed"} & set(named)
    assert "o valid" in text and "⠤⠤ train" in text and "step" in text
    assert "newest, last, best" in text and "adapters/ holds step 12" in text
    assert "python -m runner repeat=run lora.rank=8" in text


def test_json_of_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(page(capsys, "run", "--json"))
    assert document["kind"] == "run" and document["state"] == "finished" and document["adapters_step"] == 12
    assert document["changed"]["lora.rank"] == {"value": 4, "default": 8}
    assert document["settings"]["lora.dropout"] == 0.0
    assert [step for step, _ in document["valid"]] == [0, 6, 12]
    assert [one["step"] for one in document["checkpoints"]] == [4, 8, 12]
    assert document["checkpoints"][-1]["saved_for"] == ["every 4 updates", "best", "finished"]
    assert document["checkpoints"][-1]["kept_for"] == ["newest", "last", "best"]
    (score,) = document["scores"]
    assert (score["metric"], score["rows"], score["split"]) == ("exact_match", 2, "test")
    assert score["before"] is not None and score["after"] is not None
    assert document["last_rows"][-1]["step"] == 12


@pytest.mark.parametrize(
    ("state", "offered", "not_offered"),
    [
        ("stopped", ["resume=run", "repeat=run"], ["kill"]),
        ("interrupted", ["resume=run", "repeat=run"], ["kill"]),
        ("failed", ["resume=run", "repeat=run"], ["kill"]),
        ("diverged", ["repeat=run optimizer.learning_rate=0.001"], ["resume=run", "kill"]),
        ("finished", ["resume=run train.iters=24", "resume=run/checkpoints/step-0000008"], ["resume=run\n", "kill"]),
    ],
)
def test_the_commands_follow_from_the_state(
    trained: Path, capsys: pytest.CaptureFixture[str], state: str, offered: list[str], not_offered: list[str]
) -> None:
    status(trained, state=state, reason="so it is")
    text = page(capsys, "run")
    assert f"{state} at step 12" in text and "so it is" in text
    assert all(words in text for words in offered) and not any(words in text for words in not_offered)


def test_paths_with_blanks_are_quoted(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(trained, "my run")
    assert "repeat='my run' lora.rank=8" in page(capsys, "my run")


def test_stock_mlx_lm_is_named_where_it_can_load_the_base(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "mlx_lm.generate" not in page(capsys, "run")
    text = (trained / "config.yaml").read_text()
    (trained / "config.yaml").write_text(text.replace("path: builtin:tiny", "path: org/model", 1))
    assert "mlx_lm.generate --model org/model --adapter-path run/adapters --prompt" in page(capsys, "run")


def test_a_damaged_run_has_a_page_with_the_reason(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("config.yaml", "a: [\n"), ("status.json", "\x1b"), ("metrics.jsonl", "\x1b{\n")):
        (trained / name).write_text(text)
    (trained / "checkpoints/step-0000012/manifest.json").write_text("{}")
    text = page(capsys, "run")
    assert "config.yaml cannot be read" in text and "status.json cannot be understood" in text
    assert "manifest.json: it is cut short" in text and "\x1b" not in text
    assert "repeat=" not in text and "resume=" not in text
    assert json.loads(page(capsys, "run", "--json"))["problem"]


def test_control_characters_in_files_are_not_printed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status(trained, state="failed", reason="bad\x1b[2Jnews\nsecond\x07 line", parent="\x1b]0;title\x07")
    rows = [
        {"step": 12, "split": "\x1b[31m", "loss": 1.0},
        {"step": 13, "split": "test", "metric": "\x1b", "score": 1.0},
    ]
    (trained / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = page(capsys, "run")
    assert not any(c in text for c in "\x1b\x07") and "second· line" in text


def test_the_page_of_a_sweep(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (rank, loss) in enumerate([(2, 3.0), (4, 1.0), (8, None)]):
        target = tmp_path / f"sweep/{number}"
        shutil.copytree(trained, target)
        text = (target / "config.yaml").read_text()
        (target / "config.yaml").write_text(text.replace("rank: 4", f"rank: {rank}"))
        best = None if loss is None else {"step": 12, "valid_loss": loss}
        failed = {"state": "diverged", "reason": "The loss is nan."} if loss is None else {}
        status(target, best=best, **failed)
    (tmp_path / "sweep/2/metrics.jsonl").unlink()
    (tmp_path / "sweep/multirun.yaml").write_text("hydra: {}\n")
    text = page(capsys, "sweep")
    assert "sweep: 2 finished, 1 diverged" in text
    table = text[text.index("jobs, best first") : text.index("\nvalid loss\n")].splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["1", "0", "2"]
    assert table[1].split()[-1] == "lora.rank" and table[2].split()[-1] == "4"
    assert table[4].endswith("diverged: The loss is nan.")
    assert "loss of job:  a 1  b 0" in text
    assert "repeat=sweep/1 seed=1" in text
    document = json.loads(page(capsys, "sweep", "--json"))
    assert [run["run"] for run in document["runs"]] == ["1", "0", "2"] and document["differing"] == ["lora.rank"]
    assert document["best"] == {"run": "1", "valid_loss": 1.0, "step": 12}


def test_unfinished_jobs_of_a_sweep_can_be_resumed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "sweep/0")
    status(tmp_path / "sweep/0", state="running")  # nobody holds it
    (tmp_path / "sweep/multirun.yaml").write_text("hydra: {}\n")
    assert "resume=sweep/0\n" in page(capsys, "sweep")
    manifest = {"job": 0, "id": "x", "overrides": []}
    (tmp_path / "sweep/sweep.jsonl").write_text(json.dumps(manifest) + "\n")
    assert "resume=sweep\n" in page(capsys, "sweep")


def test_a_sweep_without_any_run_has_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "multirun.yaml").write_text("")
    assert "no runs" in page(capsys, tmp_path)
    assert json.loads(page(capsys, tmp_path, "--json"))["runs"] == []


def test_a_path_that_is_neither_is_refused_with_what_it_is(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases = {
        "rum": "no such folder, and no run below outputs has that name. Did you mean 'run'",
        "run/config.yaml": "not a folder",
        "run/checkpoints/step-0000012": "is a checkpoint. Its run: python -m runner show run",
        ".": "Runs lie below it: python -m runner ls",
        "empty": "neither a run",
    }
    for path, reason in cases.items():
        with pytest.raises(ConfigError, match=reason):
            show.run([path])


@pytest.mark.slow
def test_every_command_on_the_page_works(cli: Any) -> None:
    smoke = ("experiment=smoke", "train.iters=20", "hydra.run.dir=run")
    cli(*smoke, "train.stop_at=10")
    seen = set()
    for state in ("stopped", "finished"):
        document = json.loads(cli("show", "run", "--json"))
        assert document["state"] == state
        # What goes on in the same directory removes old checkpoints: last.
        told = sorted(document["commands"], key=lambda command: "resume=run" in command["words"].split())
        for number, command in enumerate(told):
            python, dash_m, runner, *words = shlex.split(command["words"])
            assert (python, dash_m, runner) == ("python", "-m", "runner")
            in_place = "resume=run" in words
            if not in_place and command["what"] in seen:
                continue  # worded alike in both states
            seen.add(command["what"])
            if words[0] not in ("chat", "serve"):  # these wait for somebody
                starts = not in_place and words[0] not in COMMANDS
                cli(*words, *([f"hydra.run.dir=other/{state}{number}"] if starts else []))
    uses = {"generate", "chat", "serve", "export"}
    assert seen == {"resume", "train longer", "vary", "branch", "warm start", *uses}


def test_the_page_says_where_the_run_comes_from(train, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {"train.iters": 2, "checkpoint.every": 1, "lora.num_layers": 1}
    first = train(tiny(**small), tmp_path / "first")
    (first / "labels.json").write_text('{"name": "baseline"}')
    branch = train(tiny(**small), tmp_path / "branch", resume=first / "checkpoints/step-0000001")
    capsys.readouterr()
    assert show.run(["branch"]) == 0
    assert "parent   branch at 1 of first (baseline)" in capsys.readouterr().out.splitlines()
    shutil.rmtree(first)
    assert show.run([str(branch)]) == 0
    assert "parent   branch at 1 of first (gone)" in capsys.readouterr().out.splitlines()
