"""The command line is parsed and checked without importing Hydra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.overrides import parse_arguments
from runner.common.errors import ConfigError
from runner.config.groups import CONF_DIR, group_choices
from runner.config.invocation import Invocation, Supervision


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lora.rnk=3", "Did you mean 'lora.rank'"),
        ("learning_rate=3", "here it is optimizer.learning_rate"),
        ("optimizer=sdg", "Did you mean 'sgd'"),
        ("experiment=first", "Did you mean 'first_run'"),
        ("optimizer.name=sgd", "type optimizer=sgd"),
        ("+lora.foo=3", "no setting 'lora.foo'"),
        ("++lora.foo=3", "no setting 'lora.foo'"),
        ("~lora.rank", "would remove a setting"),
        ("~optimizer", "would remove a setting"),
        ("train", "needs a value"),
        ("lora.rank", "needs a value: lora.rank="),
        ("train.early_stopping=3", "is a section"),
        ("data=my_folder", "data.path=my_folder"),
        ("model=org/name", "model.path=org/name"),
        ("loggers.csv.fil=x", "Did you mean 'loggers.csv.file'"),
        ("loggers.cvs.file=x.csv", "Did you mean 'csv'"),
        ("+loggers.csv.append=true", "is not an option of the logger csv"),
        ("--config-dir", "needs a folder"),
        ("--experimental-rerun=run.pickle", "is not a flag"),
        ("train.trunk.cache=false", "train.trunk.cache is now train.hidden_cache.enabled."),
        ("train.loss_piece=3", "train.loss_piece is now train.loss_chunk."),
        ("resum=run", "Did you mean 'resume'"),
        ("stop_at=3", "Did you mean 'train.stop_at'"),
        ("train.stop_at=0", "train.stop_at=0 is invalid: must be a whole number, 1 or more."),
        ("train.stop_at=-3", "must be a whole number"),
        ("train.stop_at=2.5", "must be a whole number"),
        ("supervise=yes", "supervise=yes is invalid: must be true, false, or a number of updates, 1 or more."),
        ("supervise=0", "must be true, false, or a number"),
        ("supervize=true", "Did you mean 'supervise'"),
        ("train.stop_at=3,5", "must be a whole number"),
        ("train.stop_at", "needs a value: train.stop_at="),
        ("resume", "needs a value: resume="),
    ],
)
def test_a_wrong_argument_is_refused_with_a_message(argument, message):
    with pytest.raises(ConfigError) as refused:
        parse_arguments([argument])
    assert message in str(refused.value)


def test_known_overrides_pass_and_a_plus_is_dropped():
    invocation = parse_arguments(["model=tiny", "+lora.rank=4", "++train.iters=3", "-m", "seed=1,2"])
    assert invocation.arguments == ["-m", "model=tiny", "lora.rank=4", "train.iters=3", "seed=1,2"]
    assert invocation.multirun and invocation.group_choices == {"model": "tiny"}


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'say "x"', "a,b", "a=b", "(x)", "x{y}", "ü", "a:b", "back\\slash's", "end\\", "e\\\\"]
)
def test_raw_paths_survive_hydras_grammar(name, tmp_path):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    path = str(tmp_path / name)
    (override,) = parse_arguments([f"data.path={path}"]).arguments
    assert OverridesParser.create().parse_override(override).value() == path


def test_resume_repeat_and_stop_at_belong_to_the_invocation_and_never_reach_hydra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invocation = parse_arguments(["resume='a b\\'s'", "lora.rank=4", "+train.stop_at=20"])
    assert invocation.arguments == ["lora.rank=4"] and invocation.settings == {"lora.rank": "4"}
    assert (invocation.resume, invocation.repeat, invocation.stop_at) == (tmp_path / "a b's", None, 20)
    assert parse_arguments(["repeat=runs/old"]).repeat == tmp_path / "runs/old"
    assert parse_arguments(["resume=null", "repeat=null", "train.stop_at=null", "supervise=false"]) == Invocation()
    supervised = [parse_arguments([f"supervise={value}"]) for value in ("true", "500")]
    assert [invocation.supervise for invocation in supervised] == [Supervision(), Supervision(500)]
    assert [invocation.arguments for invocation in supervised] == [[], []]


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of me")
    assert parse_arguments(["adapter=~/a.npz"]).arguments == ["adapter='/home/of me/a.npz'"]
    assert parse_arguments(["resume=~/run"]).resume == Path("/home/of me/run")


def test_commas_in_paths_separate_values_only_with_multirun(tmp_path):
    assert parse_arguments(["-m", "data.path=a,b"]).arguments == ["-m", "data.path=a,b"]
    assert parse_arguments(["data.path=a,b"]).arguments == ["data.path='a,b'"]
    (tmp_path / "a,b").mkdir()
    assert parse_arguments(["-m", f"data.path={tmp_path}/a,b"]).arguments[1] == f"data.path='{tmp_path}/a,b'"


def test_choices_of_config_dir_are_known(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nseed: 3\n")
    assert parse_arguments(["--config-dir", str(tmp_path), "experiment=mine"]).group_choices == {"experiment": "mine"}
    with pytest.raises(ConfigError):
        parse_arguments(["experiment=mine"])


def test_every_group_has_choices():
    assert group_choices("model") == [
        "llama3_1_8b_4bit",
        "llama3_2_1b",
        "qwen3_0_6b",
        "qwen3_4b_4bit",
        "smollm2_135m",
        "smollm2_135m_hub",
        "tiny",
    ]
    for folder in CONF_DIR.iterdir():
        if folder.is_dir():
            assert group_choices(folder.name), folder


def test_help_is_answered_without_importing_hydra_or_mlx():
    code = (
        "import sys; from runner.__main__ import main; rc = main(['--help']);"
        "heavy = {'hydra', 'omegaconf', 'mlx', 'mlx_lm', 'numpy', 'transformers'} & set(sys.modules);"
        "sys.exit(rc or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("python -m runner ") >= 7
    assert "first_run" in done.stdout


@pytest.mark.parametrize("name", ["1e-5", "12", "true", "null", "nan", "3.5"])
def test_a_path_that_looks_like_a_number_stays_text(name):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from runner.config.quoting import quote_text

    assert OverridesParser.create().parse_override(f"model.path={quote_text(name)}").value() == name


@pytest.mark.parametrize("flag", [["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"], ["-cd=mine"]])
def test_every_form_of_config_dir_adds_its_choices(tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/data").mkdir(parents=True)
    (tmp_path / "mine/data/foo.yaml").write_text("path: foo\n")
    invocation = parse_arguments([*flag, "data=foo"])
    assert invocation.flags == [f"--config-dir={tmp_path / 'mine'}"]
    assert invocation.group_choices == {"data": "foo"}
