"""Hostile configs: no code that they name runs, nothing is written elsewhere, and YAML bombs are refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.fault(23), pytest.mark.slow]

TINY = ("model=tiny", "data=tiny", "train.iters=1")


class Canary:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_cli) -> Path:
    """A run of the tiny model that stopped half way."""
    cli = make_cli(tmp_path_factory.mktemp("run"))
    cli("model=tiny", "data=tiny", "train.iters=4", "train.stop_at=2", "checkpoint.every=2", "hydra.run.dir=run")
    return cli.folder / "run"


TOUCH = {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": ["ran"]}]}
HANDLER = {
    "version": 1,
    "handlers": {"h": {"class": "logging.FileHandler", "filename": "ran"}},
    "root": {"handlers": ["h"]},
}
RECIPES: dict[str, dict[str, Any] | str] = {
    "a callback": {"hydra": {"callbacks": {"mine": TOUCH}}},
    "our callback, and another target": {"hydra": {"callbacks": {"runner": TOUCH}}},
    "a callback from the folder at hand": {"hydra": {"callbacks": {"mine": {"_target_": "mine.module.make"}}}},
    "a target inside the sweeper": {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"seed": TOUCH}}}},
    "a target inside the launcher": {"hydra": {"mode": "MULTIRUN", "launcher": {"jobs": TOUCH}}},
    "another launcher": {"hydra": {"launcher": {"_target_": "pathlib.Path"}}},
    "a log file of its own": {"hydra": {"job_logging": HANDLER}},
    "a log file of Hydra's": {"hydra": {"hydra_logging": HANDLER}},
    "the environment": {"hydra": {"job": {"env_set": {"PYTHONSTARTUP": "ran"}}}},
    "a copy of the environment": {"hydra": {"job": {"env_copy": ["HOME"]}}},
    "Hydra's record elsewhere": {"hydra": {"output_subdir": "../../ran"}},
    "a search path": {"hydra": {"searchpath": ["file:///"]}},
    "parameters that set the environment": {
        "hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"+hydra.job.env_set.A": "1,2"}}}
    },
    "a trillion jobs": {"hydra": {"mode": "MULTIRUN", "sweeper": {"params": {"seed": "range(0,1000000000000)"}}}},
    "a target in a section": {"data": {**TOUCH}},
    "trust in a model's code": {"model": {"trust_remote_code": True}},
    "references that multiply": {
        "data": {
            "keys": {"text": "x" * 99, "prompt": "${data.keys.text}" * 40, "completion": "${data.keys.prompt}" * 40}
        },
        "model": {"path": "${data.keys.completion}" * 40},
    },
    "a reference nested deeply": {"data": {"path": "${oc.env:A," + "[" * 900 + "}"}},
    "a long reference": {"data": {"path": "${oc.env:A," + "[" * 90_000 + "}"}},
    "a python tag": "data: !!python/object/apply:os.system ['touch ran']\n",
    "aliases that multiply": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "an alias to itself": "a: &a [*a]\n",
    "lists 450,000 deep": "- " * 450_000,
    "flow lists 900,000 deep": "a: " + "[" * 900_000,
    "a number to base 60": "seed: " + "1:" * 400_000 + "1\n",
    "100 MB": "seed: 1\n" + "# x\n" * 25_000_000,
    "not UTF-8": "data: {path: \udcff}\n",
    "a pickle": "",
}
AS_A_GROUP = {
    "a callback": "# @package hydra.callbacks.mine\n_target_: pathlib.Path.touch\n",
    "a log file": "# @package hydra.job_logging\n" + yaml.safe_dump(HANDLER),
}


def write(path: Path, what: dict[str, Any] | str, head: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = head + (what if isinstance(what, str) else yaml.safe_dump(what))
    path.write_bytes(text.encode(errors="surrogateescape") or pickle.dumps(Canary()))
    return path


def test_a_hostile_experiment_file_is_refused(cases, fresh_cli, hostile):
    for name in cases.some(list(RECIPES), 9):
        cli = fresh_cli()
        (cli.folder / "mine").mkdir()
        (cli.folder / "mine/module.py").write_text("open('ran', 'w')\n")  # where `python -m` looks first
        head = "# @package _global_\n" if RECIPES[name] else ""
        write(cli.folder / "theirs/experiment/hostile.yaml", RECIPES[name], head)
        hostile.invoke(
            cli, "--config-dir", "theirs", "experiment=hostile", *TINY, "hydra.run.dir=out", "hydra.sweep.dir=out"
        )
        left = {path.name for path in cli.folder.iterdir()} - {"mine", "theirs", "out"}
        assert not left and not list(cli.folder.rglob("config.yaml")), name
        cases.done()


@pytest.mark.parametrize("name", AS_A_GROUP)
def test_a_group_that_is_packed_into_hydras_own_settings_is_refused(cli, name, hostile):
    write(cli.folder / "theirs/data/hostile.yaml", AS_A_GROUP[name])
    hostile.invoke(cli, "--config-dir", "theirs", "data=hostile", "model=tiny", "hydra.run.dir=out")


@pytest.mark.parametrize(
    ("plugin", "name", "typed"),
    [("launcher", "basic", []), ("sweeper", "basic", []), ("launcher", "serial", ["hydra/launcher=serial"])],
)
def test_a_foreign_plugin_under_the_name_of_ours_is_refused(cli, hostile, plugin, name, typed):
    write(cli.folder / f"theirs/hydra/{plugin}/{name}.yaml", {"_target_": "pathlib.Path"})
    hostile.invoke(cli, "--config-dir", "theirs", "-m", *TINY, "seed=1,2", *typed, "hydra.sweep.dir=out")


def test_what_is_typed_still_counts_and_a_recipe_may_set_the_values_of_a_sweep(cli):
    write(
        cli.folder / "mine/experiment/own.yaml",
        {
            "hydra": {"mode": "MULTIRUN", "launcher": {"jobs": 1}, "sweeper": {"params": {"seed": "1,2"}}},
            "data": {"max_length": 64, "keys": {"text": "${oc.env:NO_SUCH,text}"}},
        },
        "# @package _global_\n",
    )
    arguments = ("--config-dir", "mine", "experiment=own", *TINY, "hydra.sweep.dir=out", "+hydra.job.env_set.A=b")
    arguments += ("hydra/launcher=process",)
    assert "2 to start" in cli(*arguments)
    assert (cli.folder / "out/1/adapters").is_dir()
    assert "[INFO]" not in cli(*TINY, "hydra/job_logging=default", "hydra.run.dir=logged")
    assert (cli.folder / "logged").is_dir() and list(cli.folder.rglob("*.log"))


def _bomb(config: dict[str, Any]) -> None:
    config["data"]["keys"] = {
        "text": "x" * 99,
        "prompt": "${data.keys.text}" * 40,
        "completion": "${data.keys.prompt}" * 40,
    }
    config["model"]["path"] = "${data.keys.completion}" * 30


STORED: dict[str, Callable[[dict[str, Any]], Any] | str] = {
    "a target": lambda config: config["data"].update(TOUCH),
    "a target among the loggers": lambda config: config.update(loggers={"csv": TOUCH}),
    "a logger that is a module": lambda config: config.update(loggers={"os:system": {"command": "touch ran"}}),
    "Hydra's settings": lambda config: config.update(hydra={"callbacks": {"mine": TOUCH}}),
    "a defaults list": lambda config: config.update(defaults=[{"override /hydra/job_logging": "default"}]),
    "references that multiply": _bomb,
    "a reference nested deeply": lambda config: config["data"].update(path="${oc.env:A," + "[" * 900 + "}"),
    "checkpoints elsewhere": lambda config: config["checkpoint"].update(dir="../../ran"),
    "a rank that no memory holds": lambda config: config["lora"].update(rank=10**9),
    "a batch that no memory holds": lambda config: config["train"].update(batch_size=10**12),
    "padding that no memory holds": lambda config: config["data"].update(pad_to=2**31 - 1),
    "a rate of 400 hexadecimal digits": "optimizer: {name: adamw, learning_rate: 0x" + "f" * 400 + "}\n",
    **{name: text for name, text in RECIPES.items() if isinstance(text, str)},
}


def stored(run: Path, target: Path, name: str) -> Path:
    """The run, copied to `target`, with that config.yaml."""
    shutil.copytree(run, target)
    change = STORED[name]
    if callable(change):
        config = yaml.safe_load((target / "config.yaml").read_text())
        change(config)
        change = config
    write(target / "config.yaml", change)
    return target


def test_a_hostile_stored_config_is_refused(cases, fresh_cli, run, hostile):
    for name in cases.some(list(STORED), 5):
        cli = fresh_cli()
        target = stored(run, cli.folder / "theirs", name)
        files = [path for path in sorted(target.rglob("*")) if path.is_file() and path.name != ".lock"]
        before = {path: path.read_bytes() for path in files}
        commands = [("resume=theirs",), ("repeat=theirs", "hydra.run.dir=new"), ("generate", "theirs", "hi")]
        commands += [("test", "theirs"), ("export", "theirs", "--to", "mlx")]
        for arguments in commands[: 2 if "logger" in name else cases.of(full=5, quick=2)]:
            hostile.invoke(cli, *arguments)
            cases.done()
        hostile.invoke(cli, "show", "theirs", expect=(0,))
        assert before == {path: path.read_bytes() for path in before}, name


def test_stored_configs_are_refused_within_a_second_and_200_mb(cases, cli, run, tmp_path, hostile):
    runs = [stored(run, tmp_path / str(number), name) for number, name in enumerate(STORED)]
    for reader in ("stored", "recipe", "show"):
        paths = [path / "config.yaml" if reader == "recipe" else path for path in runs]
        for name, found in zip(STORED, hostile.measure(cli, reader, paths), strict=True):
            assert found["error"] in ("ConfigError", "ValueError", "UnicodeDecodeError", None), (name, found)
            assert found["error"] or reader != "stored" or "logger" in name, name  # which verbs do not look at
            assert found["seconds"] < hostile.SECONDS and found["bytes"] < hostile.BYTES, (reader, name, found)
            cases.done()


@pytest.mark.long
def test_trust_in_a_models_code_is_never_taken_over_from_a_config(cli, run, hostile):
    target = cli.folder / "theirs"
    shutil.copytree(run, target)
    from runner.config.schema import ModelConfig
    from runner.export.mlx import write_model_folder
    from runner.models.load import load_base_model

    write_model_folder(load_base_model(ModelConfig(path="builtin:tiny")), cli.folder / "theirs/model")
    about = json.loads((target / "model/config.json").read_text())
    (target / "model/config.json").write_text(json.dumps({**about, "model_file": "mine.py"}))
    (target / "model/mine.py").write_text("open('ran', 'w')\nfrom mlx_lm.models.llama import Model, ModelArgs\n")
    config = yaml.safe_load((target / "config.yaml").read_text())
    config["model"] |= {"path": str(target / "model"), "trust_remote_code": True}
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    for arguments in (
        ("resume=theirs",),
        ("repeat=theirs", "hydra.run.dir=new"),
        ("test", "theirs"),
        ("export", "theirs", "--to", "fused"),
    ):
        out = hostile.invoke(cli, *arguments)
        assert "Type model.trust_remote_code=true" in out
    (target / "checkpoints").rename(cli.folder / "aside")
    for arguments in (("repeat=theirs", "hydra.run.dir=new2"), ("repeat=theirs", "hydra.run.dir=new3")):
        out = cli(*arguments, "model.trust_remote_code=true")
        assert "code that came with" in out  # on every run
        (cli.folder / "ran").unlink()


def test_an_environment_variable_named_in_a_foreign_run_is_written_to_no_file(cli, run, hostile):
    target = cli.folder / "theirs"
    shutil.copytree(run, target)
    config = yaml.safe_load((target / "config.yaml").read_text())
    config["data"]["path"] = "${oc.env:MY_PASSWORD}"
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    value = "correct-horse-battery-staple"
    for arguments in (("resume=theirs",), ("repeat=theirs", "hydra.run.dir=new"), ("test", "theirs")):
        hostile.invoke(cli, *arguments, env={"MY_PASSWORD": value})
    files = [path for path in cli.folder.rglob("*") if path.is_file()]
    assert files and not [path for path in files if value.encode() in path.read_bytes()]
