"""A resumed run ends bitwise equal to one that never stopped, with every setting on that could break it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter

import pytest
import yaml
from checkpoint_edits import edit_json
from resume_settings import FREE, FROZEN

from runner.checkpoints import verify
from runner.common.errors import CheckpointError, ConfigError
from runner.config import serialize
from runner.runs.directory import RunDirectory
from runner.training import state_files
from runner.training.optimizer import CLASSES
from runner.training.resume import numeric_differences
from runner.training.state_files import RunIdentity

ALL_FEATURES = {
    "lora.dropout": 0.2,
    "train.neftune_alpha": 5.0,
    "data.window": 32,
    "train.grad_accumulation": 3,
    "schedule.name": "cosine",
    "schedule.warmup": 2,
    "train.iters": 14,
    "train.grad_clip": 1.0,
    "train.averaging_power": 2.5,
    "checkpoint.every": 4,
    "data.metric": "exact_match",
    "data.metric_rows": 3,
    "data.max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def uninterrupted(module_folder, tiny, train):
    """The run of `ALL_FEATURES` that was never stopped; trained once."""
    folder = module_folder / "uninterrupted"
    return folder if folder.exists() else train(tiny(**ALL_FEATURES), folder)


# 50 rows in batches of 4 are 13 batches: with 3 per update, update 5 spans the end of the epoch.
@pytest.mark.parametrize(
    "stops", [[5], [2, 7, 10], *(pytest.param([stop], marks=pytest.mark.long) for stop in (1, 4, 6, 13))], ids=str
)
def test_a_run_stopped_and_resumed_ends_equal_to_the_uninterrupted_run(
    uninterrupted, tiny, train, tmp_path, stops, assert_equal_runs
):
    run = train(tiny(**ALL_FEATURES), tmp_path / "run", stop_at=stops[0])
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    for stop in stops[1:]:
        train(tiny(**ALL_FEATURES), run, resume=run, stop_at=stop)
    train(tiny(**ALL_FEATURES), run, resume=run)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert_equal_runs(uninterrupted, run)


@pytest.mark.parametrize("name", [n for n in CLASSES if n != "adamw"])
def test_a_run_with_any_optimizer_ends_equal_after_a_resume(tiny, train, tmp_path, name, assert_equal_runs):
    config = tiny(**{"optimizer.name": name, "train.iters": 4, "checkpoint.every": 2, "train.eval_batches": 1})
    whole = train(config, tmp_path / "whole")
    run = train(config, tmp_path / "run", stop_at=2)
    train(config, run, resume=run)
    assert_equal_runs(whole, run)


def test_a_branch_from_a_checkpoint_ends_equal_in_a_directory_of_its_own(
    uninterrupted, tiny, train, tmp_path, assert_equal_runs
):
    before = {p: p.read_bytes() for p in sorted(uninterrupted.rglob("*")) if p.is_file()}
    step = sorted((uninterrupted / "checkpoints").glob("step-*"))[0]
    assert step.name != "step-0000014"
    branch = train(tiny(**ALL_FEATURES), tmp_path / "branch", resume=step)
    assert_equal_runs(uninterrupted, branch)
    assert json.loads((branch / "status.json").read_text())["parent"] == str(step)
    assert before == {p: p.read_bytes() for p in sorted(uninterrupted.rglob("*")) if p.is_file()}


@pytest.fixture
def killed_branch(tiny, train, cli):
    """A run of 8 updates, and the command line whose folder has it as `whole` and, as `branch`, one that began at its
    update 4 and was killed before its first checkpoint."""
    train(tiny(**{"train.iters": 8}), cli.folder / "whole")
    process = cli.start(
        "resume=whole/checkpoints/step-0000004",
        "hydra.run.dir=branch",
        *("train.iters=100000", "checkpoint.every=null", "train.eval_every=100000", "train.report_every=1"),
    )
    cli.wait_for(cli.folder / "branch", 6, process)
    process.kill()
    process.communicate()
    assert not list((cli.folder / "branch/checkpoints").iterdir())
    return cli


ENDED = ("train.iters=8", "checkpoint.every=4", "train.eval_every=6", "train.report_every=5")


@pytest.mark.parametrize("lost", [None, "metrics.jsonl"])
def test_a_branch_killed_before_its_first_checkpoint_begins_where_it_branched(killed_branch, lost, assert_equal_runs):
    folder = killed_branch.folder
    if lost:  # killed before the rows of the other run were copied
        (folder / "branch" / lost).unlink()
    output = killed_branch("resume=branch", *ENDED)
    assert "resumed from" in output and "whole/checkpoints/step-0000004 at step 4" in output
    assert_equal_runs(folder / "whole", folder / "branch")
    status = json.loads((folder / "branch/status.json").read_text())
    assert status["state"] == "finished" and status["parent"].endswith("whole/checkpoints/step-0000004")


@pytest.mark.parametrize("change", ["gone", "of another run"])
def test_a_branch_without_a_checkpoint_never_starts_over(killed_branch, tiny, train, change):
    folder = killed_branch.folder
    shutil.rmtree(folder / "whole")
    if change != "gone":
        train(tiny(**{"train.iters": 8}), folder / "whole")
    output = killed_branch("resume=branch", expect=5)
    assert "has no checkpoint of its own yet, and the one that it branched from" in output
    assert "never starts over" in output and "repeat=branch" in output
    assert not list((folder / "branch/checkpoints").iterdir())


def test_a_checkpoint_of_before_the_losses_of_rows_were_kept_resumes(tiny, train, tmp_path, assert_equal_runs):
    whole = train(tiny(), tmp_path / "whole")
    run = train(tiny(), tmp_path / "run", stop_at=9)
    for step in (run / "checkpoints").glob("step-*"):
        edit_json(step, "train_state.json", lambda state: state.pop("row_losses_offset"))
    (run / "row_losses.jsonl").unlink()
    train(tiny(), run, resume=run)
    evaluations = [json.loads(line) for line in (run / "row_losses.jsonl").read_text().splitlines()]
    assert [evaluation["step"] for evaluation in evaluations] == [12]
    assert "tokens" in evaluations[0]
    expected = json.loads((whole / "row_losses.jsonl").read_text().splitlines()[-1])
    assert evaluations[0]["losses"] == expected["losses"]


@pytest.mark.parametrize("content", [None, "{"])
def test_without_its_losses_of_rows_a_run_resumes_and_a_branch_begins(tiny, train, tmp_path, content):
    """Only `compare` needs them."""
    run = train(tiny(), tmp_path / "run", stop_at=9)
    (run / "row_losses.jsonl").unlink()
    if content is not None:
        (run / "row_losses.jsonl").write_text(content)
    step = max((run / "checkpoints").glob("step-*"))
    branch = train(tiny(), tmp_path / "branch", resume=step)
    train(tiny(), run, resume=run)
    for folder in (run, branch):
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        evaluations = [json.loads(line) for line in (folder / "row_losses.jsonl").read_text().splitlines()]
        assert [evaluation["step"] for evaluation in evaluations] == [12] and "tokens" in evaluations[0]
        assert (folder / "run.log").read_text().count("row_losses.jsonl was removed or cut, and is begun anew") == 1


def test_the_throughput_after_a_resume_counts_the_tokens_of_this_process(tiny, train, tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("runner.training.trainer.time.perf_counter", lambda: float(next(ticks)))  # an update takes 1 s
    run = train(tiny(**{"train.report_every": 4, "checkpoint.every": 3}), tmp_path / "run", stop_at=3)
    before = json.loads((run / "checkpoints/step-0000003/train_state.json").read_text())["progress"]["tokens"]
    train(tiny(**{"train.report_every": 4, "checkpoint.every": 3}), run, resume=run)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    first = next(row for row in lines if row["split"] == "train")
    assert first["step"] == 4 and first["tokens_per_second"] == first["tokens"] - before


def test_evaluating_more_often_changes_only_the_rows(tiny, train, tmp_path, rows):
    few = train(tiny(**{"train.eval_every": 12, "train.eval_at": [5, 99], "lora.dropout": 0.1}), tmp_path / "few")
    assert [r["step"] for r in rows(few) if r["split"] == "valid"] == [0, 5, 12]
    many = train(tiny(**{"train.eval_every": 1, "lora.dropout": 0.1}), tmp_path / "many")
    assert (few / "checkpoints/step-0000012/adapters.safetensors").read_bytes() == (
        many / "checkpoints/step-0000012/adapters.safetensors"
    ).read_bytes()
    assert [r for r in rows(few) if r["split"] == "train"] == [r for r in rows(many) if r["split"] == "train"]


def test_a_resume_may_switch_gradient_checkpointing_on(tiny, train, tmp_path, assert_equal_runs):
    whole = train(tiny(), tmp_path / "whole")
    run = train(tiny(), tmp_path / "run", stop_at=5)
    train(tiny(**{"train.grad_checkpoint": True}), run, resume=run)
    assert_equal_runs(whole, run)


def test_a_compiled_run_resumes_exactly(tiny, train, tmp_path, assert_equal_runs):
    settings = {"train.compile": "always", "lora.dropout": 0.2, "train.iters": 6, "data.pad_to": 128}
    whole = train(tiny(**settings), tmp_path / "whole")
    run = train(tiny(**settings), tmp_path / "run", stop_at=3)
    train(tiny(**settings), run, resume=run)
    assert_equal_runs(whole, run)


def test_a_damaged_newest_checkpoint_is_reported_and_the_previous_one_used(tiny, train, tmp_path, assert_equal_runs):
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


def test_a_run_without_a_valid_checkpoint_is_refused_and_never_starts_over(tiny, train, tmp_path):
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


def test_a_damaged_checkpoint_that_was_named_is_refused_without_fallback(tiny, train, tmp_path):
    run = train(tiny(), tmp_path / "run", stop_at=9)
    (run / "checkpoints/step-0000009/adapters.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="step-0000009"):
        train(tiny(), tmp_path / "branch", resume=run / "checkpoints/step-0000009")


def test_a_change_of_a_frozen_setting_is_refused_with_the_difference(tiny, train, tmp_path):
    run = train(tiny(), tmp_path / "run", stop_at=3)
    for name in (
        "seed",
        "lora.rank",
        "lora.dropout",
        "lora.dtype",
        "optimizer.learning_rate",
        "optimizer.weight_decay",
        "schedule.warmup",
        "train.batch_size",
        "train.grad_accumulation",
        "train.grad_clip",
        "data.max_length",
        "data.mask_prompt",
        "data.pad_to",
        "data.window",
        "model.dtype",
    ):
        with pytest.raises(ConfigError, match=f"{name} was .* and cannot become {FROZEN[name]}"):
            train(tiny(**{name: FROZEN[name]}), run, resume=run)


def test_a_change_of_intervals_retention_and_loggers_is_applied_and_logged(tiny, train, tmp_path):
    names = (
        "train.report_every",
        "train.eval_every",
        "train.eval_batches",
        "train.test",
        "train.early_stopping.patience",
        "checkpoint.every",
        "checkpoint.keep_last",
        "checkpoint.keep_best",
        "checkpoint.result",
        "loggers",
    )
    run = train(tiny(), tmp_path / "run", stop_at=3)
    train(tiny(**{name: FREE[name] for name in names}), run, resume=run)
    log = (run / "run.log").read_text()
    for name in names:
        assert f"changed on resume: {name} " in log
    assert (run / "metrics.csv").read_text().splitlines()[0].startswith("step,split,loss")
    stored = serialize.flatten(serialize.from_dict(yaml.safe_load((run / "config.yaml").read_text()), "config.yaml"))
    assert {name: stored[name] for name in names} == {name: FREE[name] for name in names}


def test_iters_may_grow_if_the_schedule_does_not_depend_on_them(tiny, train, tmp_path, rows):
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


@pytest.mark.parametrize("name", ["step", "inverse_sqrt"])
def test_iters_may_grow_with_a_schedule_that_has_no_end(tiny, train, tmp_path, name, rows):
    few = {"schedule.name": name, "train.eval_batches": 1, "schedule.warmup": 2}
    long = train(tiny(**few, **{"train.iters": 6}), tmp_path / "long")
    run = train(tiny(**few, **{"train.iters": 4}), tmp_path / "run")
    train(tiny(**few, **{"train.iters": 6}), run, resume=run)
    assert (run / "checkpoints/step-0000006/adapters.safetensors").read_bytes() == (
        long / "checkpoints/step-0000006/adapters.safetensors"
    ).read_bytes()


def test_a_run_with_wsd_is_prolonged_from_a_checkpoint_before_its_decay(tiny, train, tmp_path):
    wsd = {"schedule.name": "wsd", "schedule.decay": 3.0, "checkpoint.every": 2, "checkpoint.keep_last": 9}
    wsd |= {"train.eval_batches": 1, "schedule.warmup": 1}
    long = train(tiny(**wsd, **{"train.iters": 10}), tmp_path / "long")
    run = train(tiny(**wsd, **{"train.iters": 7}), tmp_path / "run")
    branch = train(tiny(**wsd, **{"train.iters": 10}), tmp_path / "a", resume=run / "checkpoints/step-0000004")
    assert (branch / "checkpoints/step-0000010/adapters.safetensors").read_bytes() == (
        long / "checkpoints/step-0000010/adapters.safetensors"
    ).read_bytes()
    with pytest.raises(ConfigError, match=r"other learning rates\.\nA checkpoint of before the decay, up to step 4"):
        train(tiny(**wsd, **{"train.iters": 10}), tmp_path / "b", resume=run / "checkpoints/step-0000006")
    with pytest.raises(ConfigError, match="up to step 3, can"):
        train(tiny(**wsd, **{"train.iters": 6}), tmp_path / "c", resume=run / "checkpoints/step-0000004")


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts"])
def test_iters_cannot_grow_if_the_schedule_ends_with_them(tiny, train, tmp_path, name):
    run = train(tiny(**{"schedule.name": name}), tmp_path / "run", stop_at=3)
    with pytest.raises(ConfigError, match="other learning rates"):
        train(tiny(**{"schedule.name": name, "train.iters": 20}), run, resume=run)


def test_moved_data_is_accepted_and_changed_data_refused(tiny, train, tmp_path, assert_equal_runs):
    from runner.data.source import find_dataset

    whole = train(tiny(), tmp_path / "whole")
    data = shutil.copytree(find_dataset("builtin:tiny"), tmp_path / "data")
    run = train(tiny(**{"data.path": str(data)}), tmp_path / "run", stop_at=4)
    moved = data.rename(tmp_path / "moved")
    train(tiny(**{"data.path": str(moved)}), run, resume=run, stop_at=8)
    lines = (moved / "train.jsonl").read_text().splitlines()
    (moved / "train.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    with pytest.raises(ConfigError, match="training data changed"):
        train(tiny(**{"data.path": str(moved)}), run, resume=run)
    train(tiny(), run, resume=run)
    assert_equal_runs(whole, run)


def test_a_base_model_with_other_weights_is_refused(tiny, train, tmp_path, monkeypatch):
    import mlx.core as mx
    from mlx.utils import tree_map

    from runner.models import tiny as tiny_model

    run = train(tiny(), tmp_path / "run", stop_at=4)
    build_model = tiny_model.build_model

    def build_other_model():
        model = build_model()
        model.update(tree_map(lambda a: a * 1.001 if a.ndim > 1 else a, model.parameters()))
        mx.eval(model.parameters())
        return model

    monkeypatch.setattr(tiny_model, "build_model", build_other_model)
    with pytest.raises(ConfigError, match="base model has other weights"):
        train(tiny(), run, resume=run)


def remove_checkpoints(run):
    """Leave `run` as if it was killed before its first save."""
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    status = json.loads((run / "status.json").read_text())
    status.pop("last_checkpoint")
    (run / "status.json").write_text(json.dumps(status))


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(tiny, train, tmp_path, assert_equal_runs):
    whole = train(tiny(), tmp_path / "whole")
    run = train(tiny(), tmp_path / "run", stop_at=3)
    remove_checkpoints(run)
    train(tiny(), run, resume=run)
    assert "no checkpoint yet: training starts from the beginning" in (run / "run.log").read_text()
    assert_equal_runs(whole, run)


def test_a_warm_start_names_what_its_adapter_was_trained_with_otherwise(tiny, train, tmp_path):
    first = train(tiny(**{"train.iters": 1}), tmp_path / "first")
    other = {"train.iters": 1, "data.chat_template": False, "lora.scale": 10.0}
    run = train(tiny(adapter=str(first / "checkpoints/step-0000001"), **other), tmp_path / "run")
    line = "the adapter was trained with lora.scale=20 (here 10), data.chat_template=true (here false)\n"
    assert line in (run / "run.log").read_text()


def test_a_run_killed_before_its_first_checkpoint_repeats_its_warm_start(tiny, train, tmp_path, assert_equal_runs):
    adapter = str(train(tiny(**{"train.iters": 2}), tmp_path / "first") / "adapters")
    whole = train(tiny(adapter=adapter), tmp_path / "whole")
    run = train(tiny(adapter=adapter), tmp_path / "run", stop_at=3)
    remove_checkpoints(run)
    train(tiny(adapter=adapter), run, resume=run)
    assert_equal_runs(whole, run)
    assert yaml.safe_load((run / "config.yaml").read_text())["adapter"] == adapter


def test_a_resume_reads_its_config_and_decodes_its_checkpoint_once(tiny, train, tmp_path, monkeypatch):
    run = train(tiny(), tmp_path / "run", stop_at=5)
    counts = Counter()

    def count(owner, name):
        function = getattr(owner, name)

        def counted(*args):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, counted)

    count(RunDirectory, "read_config")
    count(state_files, "read_state")
    count(verify, "load_checkpoint")
    train(tiny(), run, resume=run, stop_at=5)  # ends where it begins: nothing is saved
    assert counts == {"read_config": 1, "read_state": 1, "load_checkpoint": 2}  # the second is that of the result


def test_numeric_differences_have_present_names_and_leave_out_what_one_side_does_not_record():
    saved = {"trunk": 14, "loss_piece": 256, "engine": "c 1", "mlx": "1", "blas": {"library": "a", "threads": 2}}
    current = {"trunk": 0, "loss_piece": 128, "engine": None, "mlx": "1", "blas": {"library": "a", "threads": 4}}
    differences = numeric_differences(RunIdentity({}, saved), RunIdentity({}, current | {"cpu_ops": False}))
    assert differences == [
        "number of blocks in the hidden-state cache was 14, is 0",
        "train.loss_chunk was 256, is 128",
        "CPU engine was c 1, is none",
        "number of BLAS threads was 2, is 4",
    ]
    assert numeric_differences(RunIdentity({}, current), RunIdentity({}, current)) == []


def test_a_resume_with_another_loss_chunk_says_once_that_results_may_differ(tiny, train, tmp_path):
    run = train(tiny(), tmp_path / "run", stop_at=3)
    train(tiny(**{"train.loss_chunk": 64, "train.hidden_cache.enabled": False}), run, resume=run)
    log = (run / "run.log").read_text()
    assert log.count("results may differ in the last digits") == 1
    assert "train.loss_chunk was 256, is 64" in log and "loss_piece" not in log and "cpu_ops" not in log


COUNT_READS = """
import os, sys
reads, resumed = [], []
def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("run/config.yaml") and not resumed:
        if arguments[2] & os.O_ACCMODE == os.O_RDONLY:
            reads.append(str(arguments[0]))
    if event == "open" and str(arguments[0]).endswith("run/metrics.jsonl"):
        resumed.append(True)
sys.addaudithook(hook)
from runner.__main__ import main
code = main(["resume=run"])
print("READS", reads)
sys.exit(code)
"""


@pytest.mark.slow
def test_the_program_reads_the_config_of_a_run_once_to_resume_it(cli):
    cli("model=tiny", "data=tiny", "train.iters=4", "train.stop_at=2", "hydra.run.dir=run")
    process = cli.start(words=("-c", COUNT_READS))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert output.splitlines()[-1] == f"READS {[str(cli.folder / 'run/config.yaml')]}"


def test_early_stopping_finishes_the_run_and_counts_across_a_resume(tiny, train, tmp_path, rows):
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
