"""Composition of every YAML in conf/, and the program as a user meets it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from runner.config import schema
from runner.config.groups import CONF_DIR, group_choices


def compose(*words: str) -> schema.Config:
    from hydra import compose, initialize_config_dir

    from runner.app.compose import register_schema
    from runner.app.resolve import resolve_config

    register_schema()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return resolve_config(compose("config", overrides=list(words)))


ALL = [(group, choice) for group in schema.GROUPS for choice in group_choices(group)]


@pytest.mark.parametrize(("group", "choice"), ALL, ids=lambda v: v)
def test_every_yaml_composes_and_passes_the_checks(group, choice):
    settings = compose(f"{group}={choice}")
    assert isinstance(settings, schema.Config)
    file = CONF_DIR / group / f"{choice}.yaml"
    text = file.read_text()
    assert re.match(r"(# @package _global_\n)?# python -m runner ", text), f"{file} lacks its command on top"
    assert f"{group}={choice}" in text.splitlines()[1 if text.startswith("# @package") else 0]


def test_a_default_lives_in_the_schema_or_in_its_yaml_but_not_in_both():
    defaults = schema.default_settings()
    for path in CONF_DIR.glob("*/*.yaml"):
        if path.parent.name in ("experiment", "loggers"):
            continue
        data = yaml.safe_load(path.read_text()) or {}

        def leaves(node, prefix):
            for key, value in node.items():
                name = f"{prefix}.{key}"
                if isinstance(value, dict):
                    yield from leaves(value, name)
                else:
                    yield name, value

        for name, value in leaves(data, path.parent.name):
            assert defaults[name] != value, f"{path}: {name}={value} is the schema's default already"


def test_cfg_job_prints_the_composed_settings(cli):
    out = cli("--cfg", "job", "model=tiny", "lora.rank=3")
    assert yaml.safe_load(out)["lora"]["rank"] == 3
    assert list(cli.folder.iterdir()) == []


def test_shell_completion_completes_groups_and_settings(cli):
    installed = cli("-sc", "install=bash")
    assert "complete" in installed
    env = {"COMP_LINE": "runner lora.ra", "COMP_POINT": "14"}
    assert "lora.rank=" in cli("-sc", "query=bash", env=env)
    env = {"COMP_LINE": "runner optimizer=", "COMP_POINT": "17"}
    assert "optimizer=sgd" in cli("-sc", "query=bash", env=env)


def test_config_dir_brings_groups_and_experiments_of_ones_own(cli):
    mine = cli.folder / "mine"
    (mine / "experiment").mkdir(parents=True)
    (mine / "lora").mkdir()
    (mine / "lora/narrow.yaml").write_text("rank: 2\n")
    (mine / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /lora: narrow\nseed: 5\ntrain:\n  iters: 7\n"
    )
    out = yaml.safe_load(cli("--config-dir", str(mine), "experiment=mine", "--cfg", "job"))
    assert (out["seed"], out["train"]["iters"], out["lora"]["rank"]) == (5, 7, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\ntrain:\n  itres: 5\n", ("bad.yaml", "train.itres", "Did you mean 'train.iters'")),
        ("train:\n  iters: many\n", ("bad.yaml", "train.iters=many", "a whole number")),
        ("defaults:\n  - override /optimizer: adamm\n", ("bad.yaml", "optimizer=adamm", "Did you mean 'adam'")),
        ("seed: [1\n", ("bad.yaml", "line 3")),
        ("lora:\n  rank: ${nowhere.rank}\n", ("nowhere",)),
        ("train:\n  stop_at: 5\n", ("train.stop_at belongs to one invocation", "on the command line")),
        ("resume: x\n", ("resume belongs to one invocation",)),
        ("train:\n  trunk:\n    cache: false\n", ("train.trunk is now train.hidden_cache.",)),
        ("train:\n  loss_piece: 64\n", ("train.loss_piece is now train.loss_chunk.",)),
    ],
)
def test_a_wrong_word_in_a_yaml_gets_a_sentence_with_its_file_and_no_traceback(cli, text, says):
    (cli.folder / "mine/experiment").mkdir(parents=True)
    (cli.folder / "mine/experiment/bad.yaml").write_text("# @package _global_\n" + text)
    out = cli("--config-dir", "mine", "experiment=bad", expect=2)
    assert "Traceback" not in out and "HYDRA_FULL_ERROR" not in out
    for part in says:
        assert part in out
    assert not (cli.folder / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lora.rank=x"], "lora.rank=x is invalid: must be a whole number"),
        (["train.iters="], "train.iters= is invalid"),
        (["optimizer=sgd", "optimizer.betas=[0.9,0.9]"], "not used by optimizer=sgd"),
        (["lora.rank=[1", "x"], "not a command"),
        (["resume=nowhere"], "no such directory"),
        (["-m", "lora.rank=2,x", "model=tiny"], "lora.rank=x is invalid"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_written(cli, words, says):
    out = cli(*words, expect=2)
    assert says in out and "Traceback" not in out
    assert not list(cli.folder.rglob("checkpoints"))


def test_a_traceback_is_shown_where_asked_for(cli):
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


def test_environment_interpolations_stay_unresolved_in_what_is_stored(cli):
    secret = "a-value-of-the-environment"
    os.makedirs(cli.folder / secret)
    for split in ("train", "valid"):
        (cli.folder / secret / f"{split}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    words = ["experiment=smoke", "data.path=${oc.env:WHERE}", "train.iters=2", "hydra.run.dir=run"]
    cli(*words, env={"WHERE": secret})
    for file in Path(cli.folder / "run").rglob("*"):
        if file.is_file() and file.suffix in (".yaml", ".json", ".jsonl", ".log"):
            assert secret not in file.read_text(), file
    assert yaml.safe_load((cli.folder / "run/config.yaml").read_text())["data"]["path"] == "${oc.env:WHERE}"
    cli("resume=run", "train.iters=4", env={"WHERE": secret})


def test_a_used_directory_is_refused_and_same_second_starts_get_their_own(cli):
    first = cli("experiment=smoke", "train.iters=2", "hydra.run.dir=run")
    assert "finished at step 2" in first
    out = cli("experiment=smoke", "hydra.run.dir=run", expect=2)
    assert "resume=" in out
    processes = [cli.start("experiment=smoke", "train.iters=1", "hydra.run.dir=outputs/x/${now:%Y}") for _ in range(3)]
    codes = sorted(p.wait() for p in processes)
    assert codes[0] == 0 and set(codes[1:]) <= {2, 3}  # named by hand: one gets it, the others are told


def test_a_file_in_the_place_of_the_output_directory_is_told_before_the_model_is_loaded(cli):
    (cli.folder / "file").write_text("x")
    out = cli("experiment=smoke", "hydra.run.dir=file/run", expect=74)
    assert "file/run" in out and "model  " not in out and "Traceback" not in out


@pytest.mark.slow
def test_a_plain_multirun_trains_each_job_in_its_directory_equal_to_the_run_alone(cli, assert_equal_runs):
    out = cli("-m", "experiment=smoke", "lora.rank=2,4", "lora.dropout=0.1", "hydra.sweep.dir=sweep")
    assert "job 1  lora.rank=4" in out
    for number, rank in enumerate((2, 4)):
        cli("experiment=smoke", f"lora.rank={rank}", "lora.dropout=0.1", f"hydra.run.dir=alone{rank}")
        assert_equal_runs(cli.folder / f"sweep/{number}", cli.folder / f"alone{rank}")
    out = cli("-m", "experiment=smoke", "lora.rank=2,4", "hydra.sweep.dir=sweep", expect=2)
    assert "exists already" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["loggers=csv", "loggers.csv.file=config.yaml"], "ends in .csv"),
        (["objective.metric=test_loss"], "needs train.test=true"),
        (["objective.metric=score"], "needs data.metric_rows"),
        (["lora.rank=2,4"], "add -m"),
        (["train.eval_every=null"], "train.eval_every=null is invalid: must have a value"),
        (["adapter=nowhere"], "adapter=nowhere: there is no such file"),
        (["--multrun"], "'--multrun' is not a flag. Did you mean '--multirun'"),
        (["-m", "lora.rank=2,4", "hydra/launcher=process", "hydra.launcher.jobs=0"], "1 or more"),
    ],
)
def test_what_could_only_go_wrong_later_is_refused_with_a_sentence(cli, words, says):
    assert says in cli("experiment=smoke", *words, expect=2)


def test_a_refused_logger_option_leaves_no_directory(cli):
    cli("experiment=smoke", "loggers=csv", "loggers.csv.file=config.yaml", "hydra.run.dir=run", expect=2)
    (cli.folder / "mine/experiment").mkdir(parents=True)
    (cli.folder / "mine/experiment/l.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /loggers: [csv]\nloggers: {csv: {fil: x.csv}}\n"
    )
    out = cli("--config-dir", "mine", "experiment=l", "model=tiny", "data=tiny", "hydra.run.dir=run", expect=2)
    assert "Did you mean 'loggers.csv.file'" in out
    assert {path.name for path in cli.folder.iterdir()} == {"mine"}


def test_a_test_split_that_is_not_there_is_told_before_training(cli):
    (cli.folder / "data").mkdir()
    (cli.folder / "data/train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    out = cli("model=tiny", "data.path=data", "train.test=true", expect=2)
    assert "no test.jsonl" in out and "step " not in out


def test_the_commands_at_the_end_can_be_pasted_whatever_the_path(cli):
    out = cli("experiment=smoke", "train.iters=2", "train.stop_at=1", "hydra.run.dir=a b's")
    command = next(line for line in out.splitlines() if line.startswith("resume "))
    import shlex

    cli(*shlex.split(command.split("python -m runner ")[1]))


def test_a_resume_leaves_the_stored_config_as_the_first_start_wrote_it(cli):
    cli("experiment=smoke", "train.iters=4", "train.stop_at=2", "hydra.run.dir=run")
    before = yaml.safe_load((cli.folder / "run/config.yaml").read_text())
    cli("resume=run")
    after = yaml.safe_load((cli.folder / "run/config.yaml").read_text())
    assert after == before


def test_a_reader_that_goes_away_does_not_end_the_run(cli):
    import subprocess
    import sys

    words = f"{sys.executable} -m runner experiment=smoke train.report_every=1 hydra.run.dir=run | head -n 2"
    subprocess.run(["bash", "-c", words], cwd=cli.folder, env=cli.environment, capture_output=True, check=True)
    assert "finished at step 20" in (cli.folder / "run/run.log").read_text()


def test_saving_by_minutes_saves_between_the_scheduled_updates(cli):
    words = ("experiment=smoke", "train.iters=60", "checkpoint.every=null", "checkpoint.every_minutes=0.0005")
    cli(*words, "checkpoint.keep_last=50", "checkpoint.keep_best=0", "hydra.run.dir=run")
    steps = sorted(int(p.name[5:]) for p in (cli.folder / "run/checkpoints").glob("step-*"))
    assert len(steps) >= 3 and steps[-1] == 60 and steps[0] < 60
