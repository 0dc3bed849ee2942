"""A job's config copied from a template equals the one that Hydra composes from its overrides."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.app import hydra_internals
from runner.app.compose import register_schema
from runner.config.groups import CONF_DIR
from runner.sweeps.job_composer import JobComposer

JOBS = [
    ["model=tiny", "data=tiny", "lora.rank=4"],
    ["model=tiny", "data=tiny", "lora.rank=16", "optimizer.learning_rate=0.001"],
    ["model=tiny", "data=tiny", "lora.keys=[self_attn.q_proj,self_attn.v_proj]"],
    ["model=tiny", "data=tiny", "lora.keys=null", "lora.alpha=8", "train.grad_clip=1"],
    ["optimizer=sgd", "optimizer.momentum=0.9", "schedule=cosine", "schedule.end=1e-5"],
    ["experiment=smoke", "seed=3"],
    ["experiment=first_run", "data.path='a b'", "train.iters=7"],
    ["lora=query_value", "loggers=csv", "loggers.csv.file=x.csv"],
    ["train.early_stopping={patience: 3, min_delta: 0.1}"],
    ["++lora.rank=5"],
]


@pytest.fixture(scope="module")
def composer():
    register_schema()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        path = hydra_internals.search_path(str(CONF_DIR), None)
        loader = hydra_internals.CheckedLoader(path, lambda file: None, lambda config: None)
        master = loader.load_configuration("config", overrides=[], run_mode=RunMode.MULTIRUN)
        yield JobComposer(loader, master)


@pytest.mark.parametrize("overrides", JOBS, ids=" ".join)
def test_a_copied_config_equals_the_composed_one(composer, overrides):
    ours = composer.compose(overrides).config
    theirs = compose("config", overrides=overrides)
    assert OmegaConf.to_container(ours) == OmegaConf.to_container(theirs)
    assert OmegaConf.get_type(ours) is OmegaConf.get_type(theirs)


def test_composing_one_job_does_not_change_another(composer):
    first = OmegaConf.to_container(composer.compose(JOBS[0]).config)
    for overrides in JOBS:
        composer.compose(overrides)
    assert OmegaConf.to_container(composer.compose(JOBS[0]).config) == first


@pytest.mark.parametrize("word", ["lora.rank=x", "lora.rnk=3", "train.iters=[1]"])
def test_an_invalid_value_or_key_is_refused_as_by_hydra(composer, word):
    with pytest.raises(OmegaConfBaseException):
        composer.compose(["model=tiny", word])
