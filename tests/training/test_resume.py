"""A run that stopped goes on as if it had not: in this process with all that could break it switched on."""

from __future__ import annotations

import json
import shutil

import pytest

from runner.common.errors import CheckpointError, ConfigError

HARD = {
    "lora.dropout": 0.2,
    "data.window": 32,
    "train.grad_accumulation": 3,
    "schedule.name": "cosine",
    "schedule.warmup": 2,
    "train.iters": 14,
    "train.grad_clip": 1.0,
    "checkpoint.every": 4,
    "data.metric": "exact_match",
    "data.metric_rows": 3,
    "data.max_new_tokens": 8,
}


@pytest.fixture(scope="module")
def kept_for_module(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def whole(kept_for_module, tiny, train):
    """The run that was never stopped."""
    folder = kept_for_module / "whole"
    return folder if folder.exists() else train(tiny(**HARD), folder)


# 50 rows in batches of 4 make 13 batches: with 3 a update, update 4 crosses the epoch's edge inside its window.
@pytest.mark.parametrize("stops", [[1], [4], [5], [6], [13], [2, 7, 10]], ids=str)
def test_a_run_stopped_by_stop_at_ends_equal_to_the_uninterrupted_one(
    whole, tiny, train, tmp_path, stops, assert_equal_runs
):
    run = train(tiny(**HARD), tmp_path / "run", stop_at=stops[0])
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    for stop in stops[1:]:
        train(tiny(**HARD), run, resume=run, stop_at=stop)
    train(tiny(**HARD), run, resume=run)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert_equal_runs(whole, run)


def test_a_branch_from_a_checkpoint_is_a_new_directory_and_ends_equal(whole, tiny, train, tmp_path, assert_equal_runs):
    before = {p: p.read_bytes() for p in sorted(whole.rglob("*")) if p.is_file()}
    step = sorted((whole / "checkpoints").glob("step-*"))[0]
    assert step.name != "step-0000014"
    branch = train(tiny(**HARD), tmp_path / "branch", resume=step)
    assert_equal_runs(whole, branch)
    assert json.loads((branch / "status.json").read_text())["parent"] == str(step)
    assert before == {p: p.read_bytes() for p in sorted(whole.rglob("*")) if p.is_file()}


def test_evaluating_more_often_changes_nothing_but_the_rows(tiny, train, tmp_path, rows):
    few = train(tiny(**{"train.eval_every": 12, "lora.dropout": 0.1}), tmp_path / "few")
    many = train(tiny(**{"train.eval_every": 1, "lora.dropout": 0.1}), tmp_path / "many")
    assert (few / "checkpoints/step-0000012/adapters.safetensors").read_bytes() == (
        many / "checkpoints/step-0000012/adapters.safetensors"
    ).read_bytes()
    assert [r for r in rows(few) if r["split"] == "train"] == [r for r in rows(many) if r["split"] == "train"]


def test_gradient_checkpointing_and_compilation_can_be_switched_on_a_resume(tiny, train, tmp_path, assert_equal_runs):
    whole = train(tiny(), tmp_path / "whole")
    run = train(tiny(), tmp_path / "run", stop_at=5)
    train(tiny(**{"train.grad_checkpoint": True}), run, resume=run)
    assert_equal_runs(whole, run)


def test_a_compiled_run_resumes_exactly_too(tiny, train, tmp_path, assert_equal_runs):
    settings = {"train.compile": "always", "lora.dropout": 0.2, "train.iters": 6, "data.pad_to": 128}
    whole = train(tiny(**settings), tmp_path / "whole")
    run = train(tiny(**settings), tmp_path / "run", stop_at=3)
    train(tiny(**settings), run, resume=run)
    assert_equal_runs(whole, run)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tiny, train, tmp_path, assert_equal_runs):
    whole = train(tiny(), tmp_path / "whole")
    run = train(tiny(), tmp_path / "run", stop_at=9)
    target = run / "checkpoints/step-0000009/optimizer.safetensors"
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    train(tiny(), run, resume=run)
    log = (run / "run.log").read_text()
    assert "damaged, not used" in log and "step-0000009" in log
    assert "resumed from" in log and "step-0000008" in log
    assert_equal_runs(whole, run)


def test_all_checkpoints_damaged_refuses_and_never_starts_over(tiny, train, tmp_path):
    run = train(tiny(), tmp_path / "run", stop_at=9)
    for file in (run / "checkpoints").rglob("adapters.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    metrics = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="never starts over"):
        train(tiny(), run, resume=run)
    assert (run / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="saved and is gone"):
        train(tiny(), run, resume=run)


def test_a_named_checkpoint_that_is_damaged_is_an_error_without_fallback(tiny, train, tmp_path):
    run = train(tiny(), tmp_path / "run", stop_at=9)
    (run / "checkpoints/step-0000009/adapters.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="step-0000009"):
        train(tiny(), tmp_path / "branch", resume=run / "checkpoints/step-0000009")


FROZEN = {
    "seed": 1,
    "lora.rank": 4,
    "lora.dropout": 0.1,
    "lora.dtype": "model",
    "optimizer.learning_rate": 2e-3,
    "optimizer.weight_decay": 0.5,
    "schedule.warmup": 3,
    "train.batch_size": 2,
    "train.grad_accumulation": 2,
    "train.grad_clip": 1.0,
    "data.max_length": 64,
    "data.mask_prompt": False,
    "data.pad_to": 8,
    "data.window": 3,
    "model.dtype": "float16",
}


def test_every_frozen_setting_refuses_a_change_with_the_difference(tiny, train, tmp_path):
    run = train(tiny(), tmp_path / "run", stop_at=3)
    for name, value in FROZEN.items():
        with pytest.raises(ConfigError, match=f"{name} was .* and cannot become {value}"):
            train(tiny(**{name: value}), run, resume=run)


FREE = {
    "train.report_every": 2,
    "train.eval_every": 3,
    "train.eval_batches": 1,
    "train.test": True,
    "train.early_stopping.patience": 50,
    "checkpoint.every": 3,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 2,
    "checkpoint.result": "last",
    "loggers": {"csv": {"file": "metrics.csv"}},
}


def test_intervals_retention_and_loggers_apply_on_resume_and_are_logged(tiny, train, tmp_path):
    run = train(tiny(), tmp_path / "run", stop_at=3)
    train(tiny(**FREE), run, resume=run)
    log = (run / "run.log").read_text()
    for name in FREE:
        assert f"changed on resume: {name} " in log
    assert (run / "metrics.csv").read_text().splitlines()[0].startswith("step,split,loss")
    import yaml

    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["train"]["report_every"] == 2 and stored["checkpoint"]["result"] == "last"


def test_iters_grow_where_the_schedule_does_not_depend_on_them(tiny, train, tmp_path, rows):
    long = train(tiny(**{"train.iters": 18}), tmp_path / "long")
    run = train(tiny(**{"train.iters": 12}), tmp_path / "run")
    train(tiny(**{"train.iters": 18}), run, resume=run)
    assert (run / "checkpoints/step-0000018/adapters.safetensors").read_bytes() == (
        long / "checkpoints/step-0000018/adapters.safetensors"
    ).read_bytes()
    fixed = {"schedule.name": "cosine", "schedule.iters": 18}
    long = train(tiny(**{"train.iters": 18}, **fixed), tmp_path / "long2")
    run = train(tiny(**{"train.iters": 12}, **fixed), tmp_path / "run2")
    train(tiny(**{"train.iters": 18}, **fixed), run, resume=run)
    assert (run / "adapters/adapters.safetensors").read_bytes() == (long / "adapters/adapters.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_iters_cannot_grow_where_the_schedule_ends_with_them(tiny, train, tmp_path, name):
    run = train(tiny(**{"schedule.name": name}), tmp_path / "run", stop_at=3)
    with pytest.raises(ConfigError, match="other learning rates"):
        train(tiny(**{"schedule.name": name, "train.iters": 20}), run, resume=run)


def test_paths_may_change_where_the_fingerprints_agree_and_other_data_are_refused(
    tiny, train, tmp_path, assert_equal_runs
):
    from runner.data.source import resolve

    whole = train(tiny(), tmp_path / "whole")
    data = shutil.copytree(resolve("builtin:tiny"), tmp_path / "data")
    run = train(tiny(**{"data.path": str(data)}), tmp_path / "run", stop_at=4)
    moved = data.rename(tmp_path / "moved")
    train(tiny(**{"data.path": str(moved)}), run, resume=run, stop_at=8)
    lines = (moved / "train.jsonl").read_text().splitlines()
    (moved / "train.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    with pytest.raises(ConfigError, match="training data changed"):
        train(tiny(**{"data.path": str(moved)}), run, resume=run)
    train(tiny(), run, resume=run)
    assert_equal_runs(whole, run)


def test_another_base_of_identical_shapes_is_refused_by_its_fingerprint(tiny, train, tmp_path, monkeypatch):
    import mlx.core as mx
    from mlx.utils import tree_map

    from runner.models import tiny as tiny_model

    run = train(tiny(), tmp_path / "run", stop_at=4)
    own = tiny_model.build_model

    def other():
        made = own()
        made.update(tree_map(lambda a: a * 1.001 if a.ndim > 1 else a, made.parameters()))
        mx.eval(made.parameters())
        return made

    monkeypatch.setattr(tiny_model, "build_model", other)
    with pytest.raises(ConfigError, match="base model has other weights"):
        train(tiny(), run, resume=run)


def test_a_run_killed_before_its_first_checkpoint_starts_again_in_its_directory(
    tiny, train, tmp_path, assert_equal_runs
):
    whole = train(tiny(), tmp_path / "whole")
    run = train(tiny(), tmp_path / "run", stop_at=3)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    status = json.loads((run / "status.json").read_text())
    status.pop("last_checkpoint")
    (run / "status.json").write_text(json.dumps(status))
    train(tiny(), run, resume=run)
    assert "from the beginning" in (run / "run.log").read_text()
    assert_equal_runs(whole, run)


def test_early_stopping_ends_the_run_as_finished_and_counts_over_a_resume(tiny, train, tmp_path, rows):
    # A learning rate so small that nothing improves by min_delta.
    settings = {
        "optimizer.learning_rate": 1e-9,
        "train.iters": 40,
        "train.eval_every": 2,
        "train.early_stopping.patience": 3,
        "train.early_stopping.min_delta": 0.01,
    }
    whole = train(tiny(**settings), tmp_path / "whole")
    status = json.loads((whole / "status.json").read_text())
    assert (status["state"], status["reason"], status["step"]) == ("finished", "early stopping", 8)
    run = train(tiny(**settings), tmp_path / "run", stop_at=5)
    train(tiny(**settings), run, resume=run)
    assert rows(run) == rows(whole)
