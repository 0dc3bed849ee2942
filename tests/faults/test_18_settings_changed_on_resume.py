"""A resume refuses a change of each frozen setting with the difference, and applies and logs each free one."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from resume_settings import BY_FINGERPRINT, COMPUTED, FREE, FROZEN

from runner.common.errors import ConfigError
from runner.common.text import shell_path
from runner.config import schema, serialize
from runner.config.resume_policy import is_free_on_resume

pytestmark = pytest.mark.fault(18)
BEGUN = {"train.iters": 8, "data.format": "completions"}
"""The run was started with these; a format that was found may be named on resume, one that was named may not change."""


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("frozen")


@pytest.fixture
def config(tiny):
    """The config that the run was started with."""
    return tiny(**BEGUN)


@pytest.fixture
def run(config, train, module_folder):
    """A run that stopped after step 4."""
    folder = module_folder / "run"
    return folder if folder.exists() else train(config, folder, stop_at=4)


def change(config, name, value):
    """Set the dotted `name`, which must have another value."""
    *path, last = name.split(".")
    section = config
    for part in path:
        section = getattr(section, part)
    assert getattr(section, last) != value
    setattr(section, last, value)


def test_the_lists_contain_all_settings():
    names = set(serialize.default_settings())
    assert set(FROZEN) == {name for name in names if not is_free_on_resume(name)}
    uncompared = {*schema.provenance_settings(), *schema.label_settings()}
    assert set(FREE) | BY_FINGERPRINT | COMPUTED | uncompared == {name for name in names if is_free_on_resume(name)}


@pytest.mark.parametrize("name", FROZEN)
def test_a_changed_frozen_setting_is_refused_and_nothing_is_written(config, train, run, contents, name):
    needed, value = FROZEN[name] if isinstance(FROZEN[name], tuple) else ({}, FROZEN[name])
    old = serialize.flatten(config)[name]
    for needed_name, needed_value in needed.items():
        change(config, needed_name, needed_value)
    change(config, name, value)
    before = contents(run, but=(".lock",))
    with pytest.raises(ConfigError) as caught:
        train(config, run, resume=run)
    shown = ["null" if v is None else str(v) for v in (old, value)]
    assert f"{name} was {shown[0]} and cannot become {shown[1]} on resume." in str(caught.value)
    assert f"python -m runner repeat={shell_path(run)}" in str(caught.value)
    assert contents(run, but=(".lock",)) == before


def test_the_format_that_was_found_may_be_named(tiny, train, tmp_path):
    run = train(tiny(**{"train.iters": 8}), tmp_path / "run", stop_at=4)
    train(tiny(**BEGUN), run, resume=run)
    assert "changed on resume: data.format auto -> completions\n" in (run / "run.log").read_text()


@pytest.mark.slow
def test_a_changed_free_setting_is_applied_logged_and_stored(tiny, train, run, tmp_path, rows):
    run = shutil.copytree(run, tmp_path / "run")
    (tmp_path / "second").mkdir()
    changes = {**FREE, "checkpoint.backup": str(tmp_path / "second")}
    before = serialize.flatten(tiny(**BEGUN))
    train(tiny(**{**BEGUN, **changes}), run, resume=run)
    log = (run / "run.log").read_text()
    stored = serialize.flatten(serialize.from_dict(yaml.safe_load((run / "config.yaml").read_text()), "config.yaml"))
    for name, value in changes.items():
        assert f"changed on resume: {name} {before[name]} -> {value}\n" in log
        assert stored[name] == value != before[name], name
    new = [row for row in rows(run) if row["step"] > 4]
    assert [row["step"] for row in new if row["split"] == "train"] == [5, 6, 7, 8, 9]
    valid = [row for row in new if row["split"] == "valid"]
    assert [row["step"] for row in valid if "loss" in row] == [6, 8, 9]
    assert [(row["step"], row["rows"]) for row in valid if "score" in row] == [(9, 2)]
    assert [row["step"] for row in new if row["split"] == "test"] == [9]
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["step-0000004", "step-0000008", "step-0000009"]
    assert json.loads((run / "status.json").read_text())["result_step"] == 9
    assert "\n9,test," in (run / "metrics.csv").read_text()
    assert list((tmp_path / "second").glob("*/checkpoints/step-0000009"))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["the command line", "the stored config"])
def test_a_changed_frozen_setting_is_refused_wherever_it_was_changed(cli, stopped, contents, place):
    text = (stopped / "config.yaml").read_text()
    if place == "the stored config":
        assert "learning_rate: 0.001\n" in text
        (stopped / "config.yaml").write_text(text.replace("learning_rate: 0.001\n", "learning_rate: 0.01\n"))
    before = contents(stopped, but=(".lock",))
    out = cli("resume=run", *(["optimizer.learning_rate=0.01"] if place == "the command line" else []), expect=2)
    assert "optimizer.learning_rate was 0.001 and cannot become 0.01" in out and "Traceback" not in out
    assert contents(stopped, but=(".lock",)) == before


@pytest.mark.long
@pytest.mark.slow
def test_a_value_from_the_environment_is_refused_only_if_the_environment_changed(
    cli, overrides, undisturbed, assert_ended_equal, contents
):
    run, environment = cli.folder / "run", {"RATE": "1e-3", "RANK": "8", "FORMAT": "auto"}
    given = ("optimizer.learning_rate=${oc.env:RATE}", "lora.rank=${oc.env:RANK}", "data.format=${oc.env:FORMAT}")
    cli(*overrides, *given, "train.stop_at=4", "hydra.run.dir=run", env=environment)
    before = contents(run, but=(".lock",))
    out = cli("resume=run", expect=2, env={**environment, "RATE": "2e-3"})
    assert "optimizer.learning_rate" in out and "${oc.env:RATE}" in out
    assert contents(run, but=(".lock",)) == before
    out = cli("resume=run", env=environment)
    assert "changed on resume" not in out
    assert_ended_equal(undisturbed(*overrides), run)
