"""From overrides to jobs: the product, and Hydra's own ways to list values."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from runner.common.errors import ConfigError
from runner.sweeps import grid


def jobs(*overrides: str) -> list[tuple[str, ...]]:
    return grid.expand_grid(OverridesParser.create().parse_overrides(list(overrides)))


def test_jobs_are_the_product_with_the_first_override_varying_slowest():
    assert jobs("a=1,2", "b=x", "c=3,4") == [
        ("a=1", "b=x", "c=3"),
        ("a=1", "b=x", "c=4"),
        ("a=2", "b=x", "c=3"),
        ("a=2", "b=x", "c=4"),
    ]


def test_lists_ranges_and_choices_are_expanded_by_hydras_parser():
    assert jobs("a=range(1,4)") == [("a=1",), ("a=2",), ("a=3",)]
    assert jobs("a=choice(p,q)") == [("a=p",), ("a=q",)]
    assert jobs("a=[q,v],[q]") == [("a=[q,v]",), ("a=[q]",)]
    assert jobs("a=1,1") == [("a=1",)]


def test_of_two_overrides_of_one_key_the_last_counts():
    assert jobs("a=1,2", "b=3", "a=5") == [("b=3", "a=5")]


def test_an_interval_is_refused():
    with pytest.raises(ConfigError, match="interval"):
        jobs("a=interval(0,1)")


def test_a_choice_of_a_group_and_a_dict_of_its_settings_are_two_keys():
    assert jobs("lora=attention", "lora={rank: 4},{rank: 8, alpha: 16}") == [
        ("lora=attention", "lora={rank:4}"),
        ("lora=attention", "lora={rank:8,alpha:16}"),
    ]
