"""Secrets in the environment reach no file and no output; secrets typed as settings are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runner.common.errors import ConfigError
from runner.config import validation
from runner.data.source import find_dataset

pytestmark = [pytest.mark.fault(28), pytest.mark.slow]

TOKEN = "hf_" + "a1B2c3D4" * 4
KEYS = {
    "HF_TOKEN": TOKEN,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "z9Y8x7W6" * 4,
    "WANDB_API_KEY": "0123456789abcdef" * 2,
    "OPENAI_API_KEY": "sk-" + "q1W2e3R4" * 4,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "GITHUB_TOKEN": "ghp_" + "m5N6b7V8" * 4,
    "MY_SECRET": "correct-horse-battery-staple",
}
SMALL = ("model=tiny", "data=tiny", "train.iters=4", "train.report_every=1", "checkpoint.every=2")


@pytest.fixture
def cli(cli):
    cli.imports_for_itself = True  # with HF_TOKEN
    return cli


def leaks(folder: Path, out: str) -> list[str]:
    """Where one of `KEYS` is: files below `folder`, by bytes and by name, and what was printed."""
    found = []
    for name, secret in KEYS.items():
        found += [f"{name} was printed"] if secret in out else []
        for path in folder.rglob("*"):
            if secret in str(path.relative_to(folder)) or (path.is_file() and secret.encode() in path.read_bytes()):
                found.append(f"{name} is in {path}")
    return found


def test_leaks_finds_a_secret(tmp_path):
    (tmp_path / "file").write_bytes(b"\0" + TOKEN.encode())
    assert leaks(tmp_path, KEYS["MY_SECRET"]) == [f"HF_TOKEN is in {tmp_path}/file", "MY_SECRET was printed"]


def test_a_run_its_resume_and_the_commands_reveal_nothing_of_the_environment(cli):
    out = cli(*SMALL, "train.stop_at=2", "loggers=csv", "hydra.run.dir=run", env=KEYS)
    for overrides in (
        ("resume=run",),
        ("ls", "."),
        ("ls", ".", "--json"),
        ("show", "run"),
        ("verify", "run"),
        ("export", "run", "--to", "mlx", "--out", "exported"),
    ):
        out += cli(*overrides, env=KEYS)
    assert "finished at step 4" in out
    assert leaks(cli.folder, out) == []


def test_a_sweep_reveals_nothing_of_the_environment(cli):
    sweep = ("-m", *SMALL, "seed=1,2", "train.iters=2", "hydra.sweep.dir=sweep")
    out = cli(*sweep, "hydra/launcher=process", "hydra.launcher.jobs=1", env=KEYS)
    out += cli("ls", ".", env=KEYS) + cli("show", "sweep", env=KEYS)
    assert "job" in out
    assert leaks(cli.folder, out) == []


@pytest.fixture
def secret_path(tmp_path_factory):
    """Data in a folder whose path is a secret, outside the folder of `cli`."""
    place = tmp_path_factory.mktemp("elsewhere") / KEYS["MY_SECRET"]
    return shutil.copytree(find_dataset("builtin:tiny"), place)


@pytest.mark.parametrize("reference", ["${ oc.env:WHERE}", "${oc.env :WHERE}"])
def test_a_reference_with_blanks_is_stored_as_written(cli, secret_path, reference):
    env = {**KEYS, "WHERE": str(secret_path)}
    out = cli(*SMALL, f"data.path='{reference}'", "data.metric=null", "hydra.run.dir=run", env=env)
    assert "finished at step 4" in out
    assert leaks(cli.folder, out) == []


def test_a_reference_through_another_setting_is_stored_as_the_reference_to_the_environment(cli, secret_path):
    env = {**KEYS, "WHERE": str(secret_path), "N": "3"}
    indirect = ("data.path=${oc.env:WHERE}", "checkpoint.backup=${data.path}-backup", "data.metric=null")
    out = cli(*SMALL, *indirect, "train.eval_every='${oc.decode:${oc.env:N}}'", "hydra.run.dir=run", env=env)
    stored = (cli.folder / "run/config.yaml").read_text()
    assert "finished at step 4" in out
    assert "backup: ${oc.env:WHERE}-backup\n" in stored and "eval_every: ${oc.decode:${oc.env:N}}\n" in stored
    assert leaks(cli.folder, out) == []


@pytest.mark.long
def test_the_value_of_a_setting_from_the_environment_is_not_stored(cli, secret_path):
    env = {**KEYS, "WHERE": str(secret_path)}
    settings = ("model=tiny", "data=tiny", "data.path=${oc.env:WHERE}", "train.iters=4", "checkpoint.every=2")
    out = cli(*settings, "train.stop_at=2", "hydra.run.dir=run", env=env)
    out += cli("resume=run", env=env)
    out += cli("resume=run/checkpoints/step-0000002", "hydra.run.dir=branch", env=env)
    out += cli("repeat=run", "seed=7", "hydra.run.dir=again", env=env)
    out += cli("-m", *settings, "seed=1,2", "hydra.sweep.dir=sweep", env=env)
    out += cli("show", "run", env=env) + cli("ls", ".", env=env) + cli("test", "run", env=env)
    assert out.count("finished at step 4") >= 3
    assert "\n  path: ${oc.env:WHERE}\n" in (cli.folder / "run/config.yaml").read_text()
    assert leaks(cli.folder, out) == []


def test_error_messages_name_the_environment_variable_not_its_value(cli, secret_path, cases):
    (secret_path / "train.jsonl").write_text('{"prompt": "a"\n')
    env = {**KEYS, "WHERE": str(secret_path)}
    wrong = {
        ("model=tiny", "data=tiny", "data.path=${oc.env:WHERE}"): "${oc.env:WHERE}/train.jsonl:1: not JSON",
        ("model.path=${oc.env:MY_SECRET}", "data=tiny"): "model.path=${oc.env:MY_SECRET}",
        ("model=tiny", "data.path=${oc.env:MY_SECRET}"): "or folder '${oc.env:MY_SECRET}'",
        ("-m", "model=tiny", "data.path=${oc.env:MY_SECRET}", "seed=1,2"): "or folder '${oc.env:MY_SECRET}'",
    }
    for overrides in cases.some(list(wrong), quick=2):
        out = cli(*overrides, expect=2, env=env)
        assert wrong[overrides] in out
        assert leaks(cli.folder, out) == []
        cases.done()


TYPED = [
    (f"model.path={TOKEN}",),
    (f"data.path=${{oc.env:X,{TOKEN}}}",),
    (f"+loggers.csv.key={TOKEN}",),
    (f"loggers={{csv: {{file: {TOKEN}}}}}",),
    (f"hydra.run.dir=out/{TOKEN}",),
    (f"+hydra.job.env_set.HF_TOKEN={TOKEN}",),
    (f"model={TOKEN}",),
    (f"data.pathh={TOKEN}",),
    (TOKEN,),
    ("-m", f"seed=1,{TOKEN}"),
    ("-m", "seed=1,2", f"+hydra.job.env_set.HF_TOKEN={TOKEN}"),
]


def test_a_typed_token_is_refused_before_anything_is_written_and_not_printed(cli, cases):
    for overrides in cases.some(TYPED, quick=3):
        out = cli("model=tiny", "data=tiny", "train.iters=1", *overrides, expect=2)
        assert "looks like a secret" in out and "Traceback" not in out, overrides
        assert list(cli.folder.iterdir()) == [] and leaks(cli.folder, out) == []
        cases.done()


@pytest.mark.parametrize("multirun", [False, True], ids=["a run", "a sweep"])
def test_a_token_in_a_users_experiment_file_is_refused(cli, multirun, tmp_path_factory, cases):
    mine = tmp_path_factory.mktemp("mine")
    (mine / "experiment").mkdir()
    recipes = {
        f"data:\n  path: {TOKEN}\n": "data.path looks like a secret",
        f"loggers:\n  csv:\n    key: {TOKEN}\n": "loggers.csv.key looks like a secret",
        f"hydra:\n  run:\n    dir: out/{TOKEN}\n": "hydra.run.dir looks like a secret",
    }
    for recipe in cases.some(list(recipes), quick=1):
        (mine / "experiment/mine.yaml").write_text(f"# @package _global_\n{recipe}")
        overrides = ("--config-dir", str(mine), "experiment=mine", "model=tiny")
        out = cli(*overrides, *(("-m", "seed=1,2") if multirun else ()), expect=2)
        assert recipes[recipe] in out
        assert list(cli.folder.iterdir()) == [] and leaks(cli.folder, out) == []
        cases.done()


@pytest.mark.parametrize("path", ["risk-assessment-dataset-of-2024", "my/task-classification-of-sentences", "disk-0"])
def test_a_token_prefix_inside_a_word_of_a_path_is_no_token(path):
    validation.refuse_secrets({"data": {"path": path}})
    with pytest.raises(ConfigError, match=r"^data\.path looks like a secret"):
        validation.refuse_secrets({"data": {"path": f"{path}/{KEYS['OPENAI_API_KEY']}"}})
