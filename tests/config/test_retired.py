"""Configs and overrides stored by earlier versions are read with present names."""

from __future__ import annotations

import pytest

from runner.config import retired, serialize
from runner.config.invocation import INVOCATION_ARGUMENTS


def test_renames_lead_from_names_that_are_gone_to_settings_that_exist():
    present = serialize.default_settings()
    assert set(retired.RENAMED.values()) <= set(present)
    assert not (set(retired.RENAMED) | set(INVOCATION_ARGUMENTS)) & set(present)


def test_a_stored_config_with_settings_of_the_invocation_is_read_without_them():
    old = {"seed": 1, "resume": "x", "repeat": None, "train": {"iters": 5, "stop_at": 3}, "experiment": "smoke"}
    assert retired.upgrade_config(old) == {"seed": 1, "train": {"iters": 5}, "experiment": "smoke"}
    assert old["train"] == {"iters": 5, "stop_at": 3}
    assert retired.upgrade_config({"train": 3, "lora": {"rank": 4}}) == {"train": 3, "lora": {"rank": 4}}


def test_renamed_settings_are_moved_with_their_values_and_empty_sections_go():
    old = {"train": {"iters": 5, "loss_piece": 64, "trunk": {"cache": False, "memory_gb": 1.0, "folder": "x"}}}
    hidden_cache = {"enabled": False, "memory_gb": 1.0, "folder": "x"}
    assert retired.upgrade_config(old) == {"train": {"iters": 5, "loss_chunk": 64, "hidden_cache": hidden_cache}}
    assert retired.upgrade_overrides(["lora.rank=4", "++train.trunk.cache=false", "train.cpu_ops"]) == [
        "lora.rank=4",
        "++train.hidden_cache.enabled=false",
        "train.cpu_engine",
    ]


def test_a_renamed_setting_or_section_is_explained_with_its_present_name():
    assert retired.explain("train.trunk.cache") == "train.trunk.cache is now train.hidden_cache.enabled."
    assert retired.explain("train.trunk") == "train.trunk is now train.hidden_cache."
    assert retired.explain("train.keep_checks") == "train.keep_checks is now train.cache_probes."


@pytest.mark.parametrize("name", INVOCATION_ARGUMENTS)
def test_a_setting_of_the_invocation_in_a_config_is_explained(name):
    assert retired.explain(name) == (
        f"{name} belongs to one invocation and cannot be stored in a config: type {name}=… on the command line."
    )
    assert retired.explain("lora.rank") is None and retired.explain("train") is None
