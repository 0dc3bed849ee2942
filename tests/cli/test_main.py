"""The program as a user meets it: exit codes, messages, printing flags, sweeps without options."""

from __future__ import annotations

import pytest
import yaml


def test_cfg_job_prints_the_composed_settings(cli):
    out = cli("--cfg", "job", "model=tiny", "lora.rank=3")
    assert yaml.safe_load(out)["lora"]["rank"] == 3
    assert list(cli.folder.iterdir()) == []


def test_hydras_own_information_is_printed_and_nothing_written(cli):
    assert "Hydra" in cli("--hydra-help")
    assert "conf" in cli("--info", "searchpath")
    assert "# @package hydra.job" in cli("--cfg", "hydra", "-p", "hydra.job")
    assert "Only one of" in cli("--cfg", "job", "-m", expect=2)
    out = cli("--info", "config", "+lora.rnk=2", expect=2)
    assert "There is no setting 'lora.rnk'" in out and out.count("All settings: python -m runner --cfg job") == 1
    assert list(cli.folder.iterdir()) == []


def test_the_version_is_printed_wherever_its_flag_stands(cli):
    from runner import __version__

    for arguments in (["--version"], ["lora.rank=3", "-V"]):
        assert cli(*arguments).strip() == f"runner {__version__}"
    assert list(cli.folder.iterdir()) == []


def test_shell_completion_completes_groups_and_settings(cli):
    installed = cli("-sc", "install=bash")
    assert "complete" in installed
    env = {"COMP_LINE": "runner lora.ra", "COMP_POINT": "14"}
    assert "lora.rank=" in cli("-sc", "query=bash", env=env)
    env = {"COMP_LINE": "runner optimizer=", "COMP_POINT": "17"}
    assert "optimizer=sgd" in cli("-sc", "query=bash", env=env)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora.rank=x"], "lora.rank=x is invalid: must be a whole number"),
        (["train.iters="], "train.iters= is invalid"),
        (["optimizer=sgd", "optimizer.betas=[0.9,0.9]"], "not used by optimizer=sgd"),
        (["lora.rank=[1", "x"], "not a command"),
        (["resume=nowhere"], "no such directory"),
        (["-m", "lora.rank=2,x", "model=tiny"], "lora.rank=x is invalid"),
    ],
)
def test_an_invalid_value_is_refused_before_anything_is_written(cli, arguments, message):
    out = cli(*arguments, expect=2)
    assert message in out and "Traceback" not in out
    assert not list(cli.folder.rglob("checkpoints"))


def test_a_traceback_is_shown_on_request(cli):
    out = cli("lora.rank=x", expect=2, env={"RUNNER_TRACEBACK": "1"})
    assert "Traceback" in out and "must be a whole number" in out


def test_secrets_never_reach_the_disk(cli):
    token = "hf_" + "a1B2" * 8
    cli(f"model.path={token}", expect=2)
    (cli.folder / "mine/experiment").mkdir(parents=True)
    (cli.folder / "mine/experiment/s.yaml").write_text(f"# @package _global_\nmodel:\n  path: {token}\n")
    out = cli("--config-dir", "mine", "experiment=s", expect=2)
    assert token not in out
    cli("--config-dir", "mine", "experiment=s", "-m", "seed=1,2", expect=2)
    assert not (cli.folder / "outputs").exists()


@pytest.mark.slow
def test_each_job_of_a_multirun_equals_the_same_run_alone(cli, assert_equal_runs):
    out = cli("-m", "experiment=smoke", "lora.rank=2,4", "lora.dropout=0.1", "hydra.sweep.dir=sweep")
    assert "job 1  lora.rank=4" in out
    for number, rank in enumerate((2, 4)):
        cli("experiment=smoke", f"lora.rank={rank}", "lora.dropout=0.1", f"hydra.run.dir=alone{rank}")
        assert_equal_runs(cli.folder / f"sweep/{number}", cli.folder / f"alone{rank}")
    out = cli("-m", "experiment=smoke", "lora.rank=2,4", "hydra.sweep.dir=sweep", expect=2)
    assert "exists already" in out


def test_a_missing_test_split_is_refused_before_training(cli):
    (cli.folder / "data").mkdir()
    (cli.folder / "data/train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    out = cli("model=tiny", "data.path=data", "train.test=true", expect=2)
    assert "no test split" in out and "step " not in out


def test_the_commands_at_the_end_can_be_pasted_for_any_path(cli):
    out = cli("experiment=smoke", "train.iters=2", "train.stop_at=1", "hydra.run.dir=a b's")
    command = next(line for line in out.splitlines() if line.startswith("resume "))
    import shlex

    cli(*shlex.split(command.split("python -m runner ")[1]))


def test_a_closed_pipe_does_not_end_the_run(cli):
    import subprocess
    import sys

    command = f"{sys.executable} -m runner experiment=smoke train.report_every=1 hydra.run.dir=run | head -n 2"
    subprocess.run(["bash", "-c", command], cwd=cli.folder, env=cli.environment, capture_output=True, check=True)
    assert "finished at step 20" in (cli.folder / "run/run.log").read_text()


def test_every_minutes_saves_between_scheduled_updates(cli):
    overrides = ("experiment=smoke", "train.iters=60", "checkpoint.every=null", "checkpoint.every_minutes=0.0005")
    cli(*overrides, "checkpoint.keep_last=50", "checkpoint.keep_best=0", "hydra.run.dir=run")
    steps = sorted(int(p.name[5:]) for p in (cli.folder / "run/checkpoints").glob("step-*"))
    assert len(steps) >= 3 and steps[-1] == 60 and steps[0] < 60
