"""A run is read from its directory, whole or damaged; runs and sweeps are found; differing settings are named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.config import serialize
from runner.config.schema import Config
from runner.reports import settings_text
from runner.runs.directory import RunDirectory
from runner.runs.find import SweepInfo, find_runs, read_sweep
from runner.runs.inspect import RunInfo, differing_settings, folder_size, read_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model that finished; copy it before changing it."""
    from runner.config import validation
    from runner.runs.run_spec import RunSpec, new_run_id
    from runner.training.run import train_run

    settings = Config()
    settings.model.path = settings.data.path = "builtin:tiny"
    settings.optimizer.name, settings.schedule.name = "adamw", "constant"
    settings.data.max_length = 128
    settings.train.iters, settings.train.report_every, settings.train.eval_every = 6, 2, 3
    settings.checkpoint.every = 3
    settings = validation.fill_defaults(settings)
    folder = tmp_path_factory.mktemp("trained") / "run"
    directory = RunDirectory(folder)
    directory.claim()
    train_run(RunSpec(settings, serialize.to_dict(settings), directory, None, new_run_id()))
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """`copy("a/b", state="failed")`: the run again in a folder below tmp_path, its status changed."""

    def do(name: str, **status: Any) -> Path:
        target = tmp_path / name
        shutil.copytree(trained, target)
        told = json.loads((target / "status.json").read_text())
        (target / "status.json").write_text(json.dumps(told | status))
        return target

    return do


def test_a_finished_run_is_read_from_its_directory(trained: Path) -> None:
    run = read_run(trained)
    status = json.loads((trained / "status.json").read_text())
    assert (run.state, run.step, run.iters, run.reason, run.problem) == ("finished", 6, 6, None, None)
    assert (run.best_loss, run.best_step) == (status["best"]["valid_loss"], status["best"]["step"])
    assert run.settings["lora.rank"] == 8 and run.settings["train.early_stopping.patience"] is None
    assert run.settings["loggers"] == {}
    assert [step for step, _ in run.losses("valid")] == [0, 3, 6]
    assert [step for step, _ in run.losses("train")] == [2, 4, 6]
    assert run.size_bytes == sum(p.stat().st_size for p in trained.rglob("*") if p.is_file())


def test_a_running_run_that_no_process_holds_is_interrupted(copy: Callable[..., Path]) -> None:
    path = copy("run", state="running", step=4)
    assert read_run(path).state == "interrupted"
    directory = RunDirectory(path)
    directory.lock()
    try:
        assert read_run(path).state == "running"
    finally:
        directory.unlock()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", "a: [1", "not plain YAML"),
        ("config.yaml", "a: &a [1]\nb: *a", "alias"),
        ("config.yaml", "a: !!python/name:os.system", "tag"),
        ("config.yaml", "- 1", "does not hold settings"),
        ("status.json", None, "status.json is missing"),
        ("status.json", '{"state": "fini', "status.json cannot be understood"),
        ("status.json", "[" * 100_000, "status.json cannot be understood"),
        ("status.json", '{"state": ["finished"], "pid": 1}', "status.json cannot be understood"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_read(
    copy: Callable[..., Path], name: str, text: str | None, reason: str
) -> None:
    path = copy("run")
    (path / name).unlink()
    if text is not None:
        (path / name).write_text(text)
    run = read_run(path)
    assert reason in (run.problem or "")
    assert (run.step, run.best_step) == (6, 6)  # from the rows where the status is lost
    assert bool(run.settings) == (name != "config.yaml")


@pytest.mark.parametrize("value", ["7", -1, 1.5, True, 10**30, [], {}])
def test_status_values_of_a_wrong_type_are_ignored(copy: Callable[..., Path], value: Any) -> None:
    path = copy("run", step=value, iters=value, best=value, updated=value, reason=[value], pid=value)
    run = read_run(path)
    assert (run.state, run.reason, run.iters) == ("finished", None, None)
    assert (run.step, run.best_step) == (6, 6)  # the rows know
    assert run.updated > 0


def test_a_loss_that_is_not_finite_is_never_best(copy: Callable[..., Path]) -> None:
    path = copy("run")
    best = '{"valid_loss": NaN, "step": 3}'
    (path / "status.json").write_text(f'{{"state": "diverged", "pid": 1, "step": 3, "best": {best}}}')
    assert read_run(path).best_loss is None


def test_torn_and_damaged_rows_are_left_out(copy: Callable[..., Path]) -> None:
    path = copy("run")
    rows = ['{"step": 1, "split": "train", "loss": 2.0}', "not json", "[1]", '{"split": "train"}', "[" * 99_999]
    rows += ['{"step": 2, "split": "train", "loss": NaN}', '{"step": 3, "split": "train", "loss": 1.0}']
    (path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 4, "split": "train", "loss": 0.5}')
    run = read_run(path)
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert run.losses("train") == [(1, 2.0), (3, 1.0)]


def test_runs_and_sweeps_are_found_newest_first_and_links_are_not_followed(
    copy: Callable[..., Path], tmp_path: Path
) -> None:
    copy("all/day/one", updated="2026-11-24T10:00:00Z")
    copy("all/day/two", updated="2026-11-24T12:00:00Z")
    for number in (0, 1, 10, 2):
        copy(f"all/sweeps/day/{number}", updated="2026-11-24T11:00:00Z", state="failed" if number == 1 else "finished")
    (tmp_path / "all/sweeps/day/multirun.yaml").write_text("hydra: {}\n")
    (tmp_path / "all/sweeps/day/notes").mkdir()
    copy("elsewhere/run")
    os.symlink(tmp_path / "elsewhere", tmp_path / "all/link")
    os.symlink(tmp_path / "elsewhere/run", tmp_path / "all/sweeps/day/3")
    (tmp_path / "all/project").mkdir()
    (tmp_path / "all/project/config.yaml").write_text("not: a run\n")
    found = find_runs(tmp_path / "all")
    assert [one.path.name for one in found] == ["two", "day", "one"]
    sweep = found[1]
    assert isinstance(sweep, SweepInfo)
    assert [run.path.name for run in sweep.runs] == ["0", "1", "2", "10"]
    assert sweep.states == {"finished": 3, "failed": 1}
    assert sweep.size_bytes == sum(run.size_bytes for run in sweep.runs)


def test_the_best_run_of_a_sweep_has_its_lowest_loss(copy: Callable[..., Path], tmp_path: Path) -> None:
    for number, loss in enumerate([3.0, 1.0, 1.0, None]):
        copy(f"sweep/{number}", best={"valid_loss": loss, "step": 3})
    best = read_sweep(tmp_path / "sweep").best
    assert best is not None and best.path.name == "1"


def test_jobs_of_the_manifest_without_a_folder_are_waiting(copy: Callable[..., Path], tmp_path: Path) -> None:
    copy("sweep/0")
    lines = [{"schema": 1, "words": ["lora.rank=2,4,8"], "time": "2026-11-24T10:00:00Z"}]
    lines += [{"job": i, "id": f"id{i}", "overrides": [f"lora.rank={2 << i}"]} for i in range(3)]
    (tmp_path / "sweep/sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (sweep,) = find_runs(tmp_path)
    assert isinstance(sweep, SweepInfo) and sweep.states == {"finished": 1, "waiting": 2}
    (tmp_path / "sweep/sweep.jsonl").write_text("{}\n")
    (sweep,) = find_runs(tmp_path)
    assert isinstance(sweep, SweepInfo) and "sweep.jsonl, line 1" in (sweep.problem or "") and len(sweep.runs) == 1


def test_differing_settings_are_those_that_differ_without_provenance() -> None:
    one = {"seed": 0, "lora.rank": 8, "experiment": "a", "lora.dropout": 0.0, "loggers": {}}
    other = {"seed": 0, "lora.rank": 4, "experiment": "b", "loggers": {"csv": {}}}
    assert differing_settings([_info(one), _info(other), _info({})]) == ["lora.rank", "loggers"]
    assert differing_settings([_info(one)]) == [] and differing_settings([]) == []
    assert differing_settings([_info(other), _info(other | {"lora.dropout": 0.1})]) == [
        "lora.dropout"
    ]  # 0.0 where not stored


def test_values_of_the_objective_that_mean_the_same_do_not_differ() -> None:
    def differing(*pairs: tuple[str, str | None]) -> list[str]:
        names = ("objective.metric", "objective.direction")
        return differing_settings([_info(dict(zip(names, pair, strict=True))) for pair in pairs])

    assert differing(("valid_loss", "minimize"), ("valid_loss", None)) == []  # the default, then and now
    assert differing(("score", None), ("score", "maximize")) == []
    assert differing(("score", None), ("score", "minimize")) == ["objective.direction"]


def test_settings_that_change_the_result_come_first() -> None:
    names = ["model.path", "train.report_every", "checkpoint.every", "lora.rank", "train.iters", "seed"]
    assert settings_text.by_importance(names) == [
        "lora.rank",
        "train.iters",
        "seed",
        "model.path",
        "train.report_every",
        "checkpoint.every",
    ]


def test_settings_are_shortened_to_what_distinguishes_them() -> None:
    assert settings_text.shortened(["/data/a/sql", "/data/b/sql", "/other/chat", "org/model"]) == [
        "…/a/sql",
        "…/b/sql",
        "…/chat",
        "org/model",
    ]
    assert settings_text.shortened(["/data/sql", "/data/sql"]) == ["…/sql", "…/sql"]
    assert settings_text.shortened(["/", "/a", "/b/a", "/c/b/a"]) == ["/", "/a", "/b/a", "/c/b/a"]
    assert settings_text.short_names(["lora.rank", "train.iters", "checkpoint.every", "optimizer.name"]) == {
        "lora.rank": "rank",
        "train.iters": "train.iters",
        "checkpoint.every": "checkpoint.every",
        "optimizer.name": "optimizer.name",
    }
    runs = [_info({"lora.rank": rank, "optimizer.learning_rate": 1e-5}) for rank in (1, 2, 4, 8, 16)]
    assert settings_text.pairs([runs, runs[:1]], ["lora.rank", "optimizer.learning_rate"]) == [
        "rank=1,2,4,8,… learning_rate=1e-05",
        "rank=1 learning_rate=1e-05",
    ]


def test_the_size_of_a_folder_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 10_000)
    (tmp_path / "run/sub").mkdir(parents=True)
    (tmp_path / "run/sub/file").write_bytes(b"x" * 10)
    os.symlink(tmp_path, tmp_path / "run/loop")
    assert 10 <= folder_size(tmp_path / "run") < 10_000


def test_defaults_are_those_of_the_chosen_optimizer_and_schedule(tiny: Callable[..., Config]) -> None:
    from runner.config import schema

    def changed(**changes: Any) -> dict[str, Any]:
        flat = serialize.flatten(tiny(**{"data.max_length": 2048, "optimizer.learning_rate": 1e-4, **changes}))
        told = settings_text.changed_from_defaults(flat)
        return {name: value for name, (value, _) in told.items() if not name.startswith(("train.", "checkpoint."))}

    always = {"model.path": "builtin:tiny", "data.path": "builtin:tiny"}
    assert changed() == always | {"optimizer.name": "adamw", "schedule.name": "constant"}
    sgd = changed(**{"optimizer.name": "sgd", "optimizer.momentum": 0.9})
    assert sgd == always | {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "schedule.name": "constant"}
    assert changed(**{"lora.alpha": 16.0})["lora.alpha"] == 16.0
    assert "lora.scale" not in changed(**{"lora.alpha": 16.0})
    assert changed(**{"lora.scale": 10.0})["lora.scale"] == 10.0
    assert settings_text.changed_from_defaults({"optimizer.name": "from the future", "new.setting": 1}) == {
        "optimizer.name": ("from the future", schema.MISSING),
        "new.setting": (1, None),
    }


def _info(settings: dict[str, Any]) -> RunInfo:
    return RunInfo(path=Path("x"), state="finished", settings=settings)


def test_the_objective_is_the_best_validation_loss_the_last_test_loss_or_the_last_score():
    from runner.runs.metric_values import metric_value

    rows = [
        {"step": 0, "split": "test", "metric": "m", "score": 0.1},
        {"step": 5, "split": "valid", "loss": 3.0},
        {"step": 9, "split": "test", "loss": 2.0},
        {"step": 9, "split": "test", "metric": "m", "score": 0.7},
    ]
    assert [metric_value(rows, 2.5, m) for m in ("valid_loss", "test_loss", "score")] == [2.5, 2.0, 0.7]
    assert metric_value(rows[:2], None, "score") is None
