"""A plain run: refused before it claims a directory, and Hydra's features in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import yaml

from runner.config.schema import DataConfig
from runner.runs.inspect import differing_settings, read_run


def test_references_to_the_environment_are_stored_unresolved(cli):
    secret = "a-value-of-the-environment"
    os.makedirs(cli.folder / secret)
    for split in ("train", "valid"):
        (cli.folder / secret / f"{split}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    overrides = ["experiment=smoke", "data.path=${oc.env:WHERE}", "train.iters=2", "hydra.run.dir=run"]
    cli(*overrides, env={"WHERE": secret})
    for file in Path(cli.folder / "run").rglob("*"):
        if file.is_file() and file.suffix in (".yaml", ".json", ".jsonl", ".log"):
            assert secret not in file.read_text(), file
    assert yaml.safe_load((cli.folder / "run/config.yaml").read_text())["data"]["path"] == "${oc.env:WHERE}"
    cli("resume=run", "train.iters=4", env={"WHERE": secret})


def test_a_repeat_of_a_run_that_stored_no_window_has_the_one_that_was_used_and_does_not_differ(cli):
    """Earlier versions stored null where the backend was to choose the window of batches."""
    cli("experiment=smoke", "train.iters=1", "data.window=3", "hydra.run.dir=run")
    file = cli.folder / "run/config.yaml"
    stored = yaml.safe_load(file.read_text())
    assert stored["data"]["window"] == 3
    stored["data"]["window"] = None
    file.write_text(yaml.safe_dump(stored))
    assert "finished at step 1" in cli("repeat=run", "hydra.run.dir=again")
    assert yaml.safe_load((cli.folder / "again/config.yaml").read_text())["data"]["window"] == 3
    assert differing_settings([read_run(cli.folder / "run"), read_run(cli.folder / "again")]) == []
    shutil.rmtree(cli.folder / "run/checkpoints")  # then nothing says what it was
    assert read_run(cli.folder / "run").settings["data.window"] is None
    cli("repeat=run", "hydra.run.dir=default")
    assert yaml.safe_load((cli.folder / "default/config.yaml").read_text())["data"]["window"] == DataConfig.window


def test_a_used_directory_is_refused_and_one_of_several_starts_gets_a_new_one(cli):
    first = cli("experiment=smoke", "train.iters=2", "hydra.run.dir=run")
    assert "finished at step 2" in first
    out = cli("experiment=smoke", "hydra.run.dir=run", expect=2)
    assert "resume=" in out
    processes = [cli.start("experiment=smoke", "train.iters=1", "hydra.run.dir=outputs/x/${now:%Y}") for _ in range(3)]
    codes = sorted(p.wait() for p in processes)
    assert codes[0] == 0 and set(codes[1:]) <= {2, 3}  # named by hand: one gets it, the others are told


def test_a_file_at_the_path_of_the_directory_is_refused_before_the_model_is_loaded(cli):
    (cli.folder / "file").write_text("x")
    out = cli("experiment=smoke", "hydra.run.dir=file/run", expect=74)
    assert "file/run" in out and "model  " not in out and "Traceback" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loggers=csv", "loggers.csv.file=config.yaml"], "ends in .csv"),
        (["objective.metric=test_loss"], "needs train.test=true"),
        (["objective.metric=score"], "needs data.metric_rows"),
        (["lora.rank=2,4"], "add -m"),
        (["train.eval_every=null"], "train.eval_every=null is invalid: must have a value"),
        (["train.iters=12", "train.stop_at=13"], "train.stop_at=13 is invalid: must be at most train.iters=12"),
        (["adapter=nowhere"], "adapter=nowhere: there is no such file"),
        (["--multrun"], "'--multrun' is not a flag. Did you mean '--multirun'"),
        (["-m", "lora.rank=2,4", "hydra/launcher=process", "hydra.launcher.jobs=0"], "1 or more"),
    ],
)
def test_a_config_that_would_fail_later_is_refused_at_the_start(cli, arguments, message):
    assert message in cli("experiment=smoke", *arguments, expect=2)


def test_a_refused_logger_option_leaves_no_directory(cli):
    cli("experiment=smoke", "loggers=csv", "loggers.csv.file=config.yaml", "hydra.run.dir=run", expect=2)
    (cli.folder / "mine/experiment").mkdir(parents=True)
    (cli.folder / "mine/experiment/l.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /loggers: [csv]\nloggers: {csv: {fil: x.csv}}\n"
    )
    out = cli("--config-dir", "mine", "experiment=l", "model=tiny", "data=tiny", "hydra.run.dir=run", expect=2)
    assert "Did you mean 'loggers.csv.file'" in out
    assert {path.name for path in cli.folder.iterdir()} == {"mine"}


def test_a_resume_keeps_the_stored_config(cli):
    cli("experiment=smoke", "train.iters=4", "train.stop_at=2", "hydra.run.dir=run")
    before = yaml.safe_load((cli.folder / "run/config.yaml").read_text())
    cli("resume=run")
    after = yaml.safe_load((cli.folder / "run/config.yaml").read_text())
    assert after == before


def test_a_run_with_a_checkpoint_resumes_without_the_adapter_that_it_started_from(cli):
    cli("experiment=smoke", "train.iters=1", "hydra.run.dir=first")
    cli("experiment=smoke", "adapter=first/adapters", "train.iters=4", "train.stop_at=2", "hydra.run.dir=run")
    assert "was trained with" not in (cli.folder / "run/run.log").read_text()
    shutil.rmtree(cli.folder / "first")
    cli("resume=run")
    stored = yaml.safe_load((cli.folder / "run/config.yaml").read_text())
    assert stored["adapter"] == str(cli.folder / "first/adapters")
    assert "changed on resume" not in (cli.folder / "run/run.log").read_text()


def test_a_refused_branch_leaves_no_directory(cli):
    cli("experiment=smoke", "train.iters=4", "train.stop_at=2", "checkpoint.every=2", "hydra.run.dir=run")
    out = cli("resume=run/checkpoints/step-0000002", "lora.rank=3", "hydra.run.dir=new", expect=2)
    assert "lora.rank was" in out
    assert not (cli.folder / "new").exists()


def test_hydras_record_interpolations_and_job_options_work_in_a_run(cli):
    cli(
        "experiment=smoke",
        "train.iters=2",
        "train.stop_at=1",
        "hydra.run.dir=outputs/${now:%Y}/run",
        "data.keys.text=${hydra:runtime.cwd}",
        "checkpoint.backup=${hydra:runtime.output_dir}/backup",
        "hydra.job.chdir=true",
        "+hydra.job.env_set.MARK=1",
        "hydra.output_subdir=.record",
    )
    (run,) = (cli.folder / "outputs").glob("2*/run")
    assert {p.name for p in (run / ".record").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    overrides = yaml.safe_load((run / ".record/overrides.yaml").read_text())
    assert overrides[:2] == ["experiment=smoke", "train.iters=2"]
    record = yaml.safe_load((run / ".record/hydra.yaml").read_text())["hydra"]
    assert record["runtime"]["output_dir"] == str(run) and record["job"]["env_set"] == {"MARK": "1"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["keys"]["text"] == str(cli.folder)
    assert config["checkpoint"]["backup"] == f"{run}/backup"
    before = (run / ".record/hydra.yaml").read_bytes()
    cli(f"resume={run}")
    assert (run / ".record/hydra.yaml").read_bytes() == before and not (run / ".hydra").exists()


def test_a_typed_callback_is_called_at_the_start_and_the_end_of_the_run(cli):
    (cli.folder / "mine.py").write_text(
        "from hydra.experimental.callback import Callback\n"
        "class Recorder(Callback):\n"
        "    def on_run_start(self, config, **kwargs): print('CALLED start', config.hydra.run.dir)\n"
        "    def on_job_end(self, config, job_return, **kwargs): print('CALLED job', job_return.status.name)\n"
        "    def on_run_end(self, config, **kwargs): print('CALLED end')\n"
    )
    environment = {"PYTHONPATH": f"{cli.environment['PYTHONPATH']}:{cli.folder}"}
    callback = "+hydra.callbacks.recorder._target_=mine.Recorder"
    out = cli("experiment=smoke", "train.iters=1", callback, "hydra.run.dir=run", env=environment)
    assert [line for line in out.splitlines() if line.startswith("CALLED")] == [
        f"CALLED start {cli.folder}/run",
        "CALLED job COMPLETED",
        "CALLED end",
    ]
