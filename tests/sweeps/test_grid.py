"""From overrides to jobs: the product, Hydra's own ways to list values, and identities that survive any order."""

from __future__ import annotations

import itertools

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from runner.common.errors import ConfigError
from runner.runs.sweep_manifest import job_id
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


@given(st.permutations(["lora.rank=4", "seed=1", "model=tiny", "optimizer.learning_rate=0.001"]))
def test_a_job_id_does_not_depend_on_the_order_of_overrides(overrides):
    assert job_id(overrides) == job_id(sorted(overrides))


def test_identity_ignores_what_belongs_to_hydra_and_nothing_else():
    base = job_id(["lora.rank=4"])
    for word in ("hydra.sweep.dir=x", "hydra/launcher=process", "stored=run"):
        assert job_id(["lora.rank=4", word]) == base
    for word in ("train.iters=3", "experiment=x", "seed=1", "adapter=a"):
        assert job_id(["lora.rank=4", word]) != base


@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 4), min_size=1, unique=True), min_size=1),
    st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 4), min_size=1, unique=True)),
)
def test_extending_a_grid_by_values_keeps_every_earlier_job(first, more):
    wider = {k: sorted({*v, *more.get(k, [])}) for k, v in first.items()}
    overrides = [f"{k}={','.join(map(str, v))}" for k, v in first.items()]
    typed = [f"{k}={','.join(map(str, v))}" for k, v in wider.items()]
    before = {job_id(job) for job in jobs(*overrides)}
    after = [job_id(job) for job in jobs(*grid.merge_arguments(overrides, typed))]
    assert before <= set(after)
    assert len(after) == len(set(after)) == len(list(itertools.product(*wider.values())))
