"""Configs are composed from conf/, from --config-dir and from the command line, and errors name the file."""

from __future__ import annotations

import re

import pytest
import yaml

from runner.common.errors import ConfigError
from runner.config import schema, serialize
from runner.config.groups import CONF_DIR, group_choices


def compose(*overrides: str) -> schema.Config:
    from hydra import compose, initialize_config_dir

    from runner.app.compose import register_schema
    from runner.app.resolve import resolve_config

    register_schema()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return resolve_config(compose("config", overrides=list(overrides)))


ALL = [(group, choice) for group in schema.GROUPS for choice in group_choices(group)]


@pytest.mark.parametrize(("group", "choice"), ALL, ids=lambda v: v)
def test_every_yaml_composes_and_passes_the_checks(group, choice):
    settings = compose(f"{group}={choice}")
    assert isinstance(settings, schema.Config)
    file = CONF_DIR / group / f"{choice}.yaml"
    text = file.read_text()
    assert re.match(r"(# @package _global_\n)?# python -m runner ", text), f"{file} lacks its command on top"
    assert f"{group}={choice}" in text.splitlines()[1 if text.startswith("# @package") else 0]


def test_an_objective_is_one_metric_or_a_list_of_them():
    assert compose("objective.metric=tokens_per_second").objective.metric == "tokens_per_second"
    config = compose("objective.metric=[valid_loss,peak_memory_gb]", "objective.direction=[minimize,maximize]")
    assert config.objective.metric == ["valid_loss", "peak_memory_gb"]
    assert config.objective.direction == ["minimize", "maximize"]
    assert serialize.from_dict(serialize.to_dict(config), "config.yaml") == config


def test_config_dir_adds_groups_and_experiments(cli):
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
def test_an_error_in_a_yaml_names_the_file_and_shows_no_traceback(cli, text, says):
    (cli.folder / "mine/experiment").mkdir(parents=True)
    (cli.folder / "mine/experiment/bad.yaml").write_text("# @package _global_\n" + text)
    out = cli("--config-dir", "mine", "experiment=bad", expect=2)
    assert "Traceback" not in out and "HYDRA_FULL_ERROR" not in out
    for part in says:
        assert part in out
    assert not (cli.folder / "outputs").exists()


def test_a_config_without_the_schema_is_refused():
    from omegaconf import OmegaConf

    from runner.app.resolve import resolve_config

    with pytest.raises(ConfigError, match="must start with `- schema`"):
        resolve_config(OmegaConf.create({"seed": 1}))


def test_a_resume_in_place_keeps_the_warm_start_and_a_branch_starts_from_its_checkpoint(tmp_path):
    from runner.app.compose import stored_settings
    from runner.config.invocation import Invocation
    from runner.runs.run_spec import ResumeSource

    (tmp_path / "config.yaml").write_text("adapter: ${oc.env:FIRST}/adapters\n")
    in_place, branch = ResumeSource(tmp_path), ResumeSource(tmp_path, tmp_path / "checkpoints/step-0000004")
    assert stored_settings(Invocation(resume=tmp_path), in_place)["adapter"] == "${oc.env:FIRST}/adapters"
    assert "adapter" not in stored_settings(Invocation(resume=branch.checkpoint), branch)
    (tmp_path / "config.yaml").write_text("{adapter: first/adapters, method: {name: dpo, beta: 0.1}}\n")
    branch = ResumeSource(tmp_path, branch.checkpoint)
    assert stored_settings(Invocation(resume=branch.checkpoint), branch)["adapter"] == "first/adapters"  # the reference
