"""The space of a search: Hydra's overrides as dimensions, and suggested values as overrides."""

from __future__ import annotations

import math

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from runner.common.errors import ConfigError
from runner.sweeps.search.dimensions import Choices, Interval
from runner.sweeps.search.space import make_space

PARSER = OverridesParser.create()


def space(*texts: str):
    return make_space([PARSER.parse_override(text) for text in texts])


def test_every_kind_of_sweep_is_a_dimension():
    found = space(
        "optimizer.learning_rate=tag(log,interval(1e-5,1e-2))",
        "lora.rank=interval(4,64)",
        "lora.scale=interval(1,20)",
        "lora.alpha=4,8,16",
        "train.batch_size=range(2,9,2)",
        "lora.dropout=range(0.0,0.31,0.1)",
        "schedule=linear,cosine",
        "lora.keys=choice([q_proj],[q_proj,v_proj])",
        "data.mask_prompt=true,false",
        "train.clip_norm=null,1.0",
        "train.iters=20",
    ).dimensions
    assert found == {
        "optimizer.learning_rate": Interval(1e-5, 1e-2, False, True),
        "lora.rank": Interval(4, 64, True, False, 1),  # a whole number, although Hydra makes floats of the ends
        "lora.scale": Interval(1.0, 20.0, False, False),
        "lora.alpha": Choices((4, 8, 16), ("4", "8", "16")),
        "train.batch_size": Interval(2, 8, True, False, 2),
        "lora.dropout": Interval(0.0, pytest.approx(0.3), False, False, 0.1),
        "schedule": Choices(("linear", "cosine"), ("linear", "cosine")),
        "lora.keys": Choices(("[q_proj]", "[q_proj,v_proj]"), ("[q_proj]", "[q_proj,v_proj]")),
        "data.mask_prompt": Choices((True, False), ("True", "False")),
        "train.clip_norm": Choices((None, 1.0), ("null", "1.0")),
    }


def test_what_is_not_swept_is_shared_and_the_last_override_of_a_key_counts():
    found = space("lora.rank=4,8", "train.iters=20", "lora.rank=16", "seed=1,2", "train.iters=30")
    assert found.fixed == ("lora.rank=16", "train.iters=30") and list(found.dimensions) == ["seed"]
    assert list(space("lora.rank=16", "lora.rank=4,8").dimensions) == ["lora.rank"]
    assert space("lora.rank=16", "lora.rank=4,8").fixed == ()


def test_a_suggested_value_is_an_override_in_hydras_grammar():
    found = space("lora.keys=choice([q_proj],[q_proj,v_proj])", "data.mask_prompt=true,false", "name='a b',c")
    params = {"lora.keys": "[q_proj,v_proj]", "data.mask_prompt": False, "name": "'a b'"}
    assert found.overrides(params) == ["lora.keys=[q_proj,v_proj]", "data.mask_prompt=False", "name='a b'"]
    for text in found.overrides(params):
        assert not PARSER.parse_override(text).is_sweep_override()


def test_a_drawn_number_has_four_digits_and_stays_within_its_interval():
    wide, narrow = Interval(1e-5, 1e-2, False, True), Interval(0.123456, 0.123457, False, False)
    assert wide.rounded(0.00031415926) == 0.0003142
    assert narrow.rounded(0.1234561) == 0.1234561
    assert Interval(1, 9, True, False, 1).rounded(7) == 7


def test_the_values_of_a_range_are_the_numbers_that_were_meant():
    found = space("lora.dropout=range(0.0,0.81,0.1)").dimensions["lora.dropout"]
    assert found.values() == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8] and found.ends() == [0.0, 0.8]
    assert found.rounded(0.1 + 0.2) == 0.3 and found.contains(0.7) and not found.contains(0.75)
    assert space("lora.scale=range(10.0,10.01,0.001)").dimensions["lora.scale"].rounded(10.003) == 10.003


def test_a_variable_is_a_whole_number_where_the_setting_that_follows_it_is():
    overrides = [PARSER.parse_override("+vars.x=interval(4,16)")]
    for setting, is_int in (("lora.rank", True), ("lora.scale", False)):
        found = make_space(overrides, references=lambda name=setting: {name: "${vars.x}"}).dimensions["+vars.x"]
        assert isinstance(found, Interval) and found.is_int is is_int


def test_a_setting_that_is_null_unless_set_is_a_number_by_its_type():
    found = space(
        "lora.alpha=range(8,33,8)",
        "train.grad_clip=range(1,5)",
        "method.group_size=interval(4,16)",
        "optimizer.weight_decay=interval(0,1)",
        "optimizer.nesterov=true,false",
    ).dimensions
    assert found == {
        "lora.alpha": Interval(8, 32, True, False, 8),
        "train.grad_clip": Interval(1, 4, True, False, 1),
        "method.group_size": Interval(4, 16, True, False, 1),
        "optimizer.weight_decay": Interval(0.0, 1.0, False, False),
        "optimizer.nesterov": Choices((True, False), ("True", "False")),
    }


def test_combinations_of_a_grid():
    found = space("lora.rank=4,8", "train.batch_size=range(1,4)")
    assert found.size == 6 and found.combinations()[:2] == [
        {"lora.rank": 4, "train.batch_size": 1},
        {"lora.rank": 4, "train.batch_size": 2},
    ]
    endless = space("lora.rank=4,8", "lora.scale=interval(1,2)")
    assert math.isinf(endless.size)
    with pytest.raises(ConfigError, match=r"lora\.scale=interval\(1,2\) has no end"):
        endless.combinations()


def test_the_extremes_hold_every_choice_and_both_ends_one_at_a_time():
    extremes = space("lora.rank=4,8,16", "lora.scale=interval(1,2)").extremes()
    assert extremes[0] == {"lora.rank": 4, "lora.scale": 1.0}
    assert {(e["lora.rank"], e["lora.scale"]) for e in extremes} == {(4, 1.0), (8, 1.0), (16, 1.0), (4, 2.0)}


def test_a_point_of_the_space_is_recognized():
    found = space("lora.rank=4,8", "lora.scale=interval(1,2)", "seed=range(3)")
    assert found.contains({"lora.rank": 4, "lora.scale": 1.5, "seed": 0})
    assert not found.contains({"lora.rank": 5, "lora.scale": 1.5, "seed": 0})
    assert not found.contains({"lora.rank": 4, "lora.scale": 2.5, "seed": 0})
    assert not found.contains({"lora.rank": 4, "lora.scale": None, "seed": 0})
    assert not found.contains({"lora.rank": 4, "lora.scale": 1.5})


@pytest.mark.parametrize(
    "text, reason",
    [
        ("lora.scale=interval(2,1)", "from a lower to a higher"),
        ("lora.scale=tag(log,interval(0,1))", "begins above 0"),
        ("lora.scale=tag(lg,interval(1,2))", "knows the tag log"),
        ("lora.scale=1", "needs a setting to vary"),
        ("experiment=a,b", "recipe"),
    ],
)
def test_what_cannot_be_searched_is_refused(text, reason):
    with pytest.raises(ConfigError, match=reason):
        space(text)
