"""Configs and overrides stored by earlier versions are read with present names."""

from __future__ import annotations

import pytest

from runner.config import retired, schema


def test_renames_lead_from_names_that_are_gone_to_settings_that_exist():
    present = schema.default_settings()
    assert set(retired.RENAMED.values()) <= set(present)
    assert not (set(retired.RENAMED) | set(retired.OF_THE_INVOCATION)) & set(present)


def test_a_stored_config_with_settings_of_the_invocation_is_read_without_them():
    old = {"seed": 1, "resume": "x", "repeat": None, "train": {"iters": 5, "stop_at": 3}, "experiment": "smoke"}
    assert retired.upgrade_config(old) == {"seed": 1, "train": {"iters": 5}, "experiment": "smoke"}
    assert old["train"] == {"iters": 5, "stop_at": 3}
    assert retired.upgrade_config({"train": 3, "lora": {"rank": 4}}) == {"train": 3, "lora": {"rank": 4}}


@pytest.mark.parametrize("name", retired.OF_THE_INVOCATION)
def test_a_setting_of_the_invocation_in_a_config_is_explained(name):
    assert retired.explain(name) == (
        f"{name} belongs to one invocation and cannot be stored in a config: type {name}=… on the command line."
    )
    assert retired.explain("lora.rank") is None and retired.explain("train") is None
