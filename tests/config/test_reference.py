"""docs/config.md and the default files in conf/ are generated from the schema, and compose to its defaults."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from runner.config import reference, schema, serialize
from runner.config.groups import CONF_DIR, group_choices
from runner.config.invocation import Invocation
from runner.config.quoting import yaml_value


def compose(*overrides: str) -> dict:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from runner.app.compose import register_schema

    register_schema()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        composed = OmegaConf.to_container(compose("config", overrides=list(overrides)))
    assert isinstance(composed, dict)
    return composed


def with_defaults(group: str, choice: str) -> dict:
    """The section as the schema states it for this choice."""
    section = serialize.to_dict(schema.Config())[group]
    return section | schema.choice_options(group, choice) | reference.GENERATED_CHOICES[f"{group}/{choice}"]


@pytest.mark.parametrize("name", reference.GENERATED_CHOICES)
def test_a_choice_that_shows_its_settings_composes_to_the_defaults_of_the_schema(name):
    group, choice = name.split("/")
    assert compose(f"{group}={choice}")[group] == with_defaults(group, choice)


def test_the_default_choice_of_every_group_and_every_optimizer_schedule_and_method_shows_its_settings():
    defaults = yaml.safe_load((CONF_DIR / "config.yaml").read_text())["defaults"]
    chosen = {f"{group}/{choice}" for entry in defaults if isinstance(entry, dict) for group, choice in entry.items()}
    shown = {name for name in chosen if name.split("/")[0] in schema.GROUPS and (CONF_DIR / f"{name}.yaml").is_file()}
    shown |= {f"{group}/{choice}" for group in ("optimizer", "schedule", "method") for choice in group_choices(group)}
    assert shown == set(reference.GENERATED_CHOICES)


@pytest.mark.parametrize("path", sorted(CONF_DIR.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF_DIR)))
def test_every_file_begins_with_its_launch_command(path: Path):
    first, *_ = path.read_text().removeprefix("# @package _global_\n").splitlines()
    assert first.startswith("# python -m runner")
    if path.name != "config.yaml" and path.parent.name != "experiment":
        assert f"{path.parent.name}={path.stem}" in first


def test_the_page_and_the_files_are_up_to_date_and_a_difference_is_named(tmp_path, monkeypatch, capsys):
    assert reference.main(["--check"]) == 0
    page = tmp_path / "config.md"
    page.write_text("old")
    monkeypatch.setattr(reference, "PAGE", page)
    assert reference.main(["--check"]) == 1
    assert f"{page} differs from the schema: run python -m runner.config.reference" in capsys.readouterr().err
    assert reference.main([]) == 0 and page.read_text() == reference.reference_page()


def test_the_page_shows_defaults_by_choice_bounds_and_what_a_resume_may_change():
    page = reference.reference_page()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `") and line.count("|") == 6}
    assert set(rows) == set(serialize.default_settings())
    assert (
        "| `0.01` (adamw), `0.0` (sgd, lion, adafactor, muon) | 0 or more. | frozen |" in rows["optimizer.weight_decay"]
    )
    assert "| `8` | From 1 to 16,384. | frozen |" in rows["lora.rank"]
    assert "frozen" not in rows["train.iters"] and "by its group" in rows["model.path"]
    assert "| `train.stop_at=N` |" in page


def test_every_setting_and_every_field_of_an_invocation_is_documented():
    documented = dict(reference.documented_settings())
    assert set(documented) == set(serialize.default_settings())
    assert all(found.doc.endswith(".") for found in documented.values())
    assert set(reference.field_docstrings(Invocation)) == set(Invocation.__dataclass_fields__)


@pytest.mark.parametrize("value", [1e-8, 2.5e-7, 1e20, 0.5, 3, True, None, [0.9, 1e-9], "auto", {}])
def test_values_are_written_as_yaml_reads_them_back(value):
    assert yaml.safe_load(yaml_value(value)) == value
