"""Hydra's own node for one job of a sweep: what ${hydra:…}, callbacks and the record in .hydra/ see."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.app import hydra_internals
from runner.app.compose import without_hydra

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def with_hydra_node(
    config: DictConfig, sweep_config: DictConfig, *, number: int, overrides: Sequence[str], choices: Mapping[str, Any]
) -> DictConfig:
    """Return a copy of the job's `config` with the node that Hydra's launchers give a job.

    Args:
        config: the composed config of the job, without Hydra's node.
        sweep_config: the composed config of the sweep, with Hydra's node.
        number: the job's number.
        overrides: its overrides.
        choices: the choices of groups that it was composed with.
    """
    job_config = copy.deepcopy(config)
    node = copy.deepcopy(sweep_config.hydra)
    with read_write(node), open_dict(node):
        node.job.num = node.job.id = number
        node.job.override_dirname = hydra_internals.override_dirname(overrides, node.job.config.override_dirname)
        node.overrides.task = list(overrides)
        node.runtime.choices.update(choices)
    with read_write(job_config), open_dict(job_config):
        job_config.hydra = node
    return job_config


def set_folder(job_config: DictConfig, sweep: Path, folder: str) -> None:
    """Set the folder of the job in Hydra's node, and make the node that of ${hydra:…}."""
    with read_write(job_config.hydra), open_dict(job_config.hydra):
        job_config.hydra.sweep.dir, job_config.hydra.sweep.subdir = str(sweep), folder
        job_config.hydra.runtime.output_dir = str(sweep / folder)
    HydraConfig.instance().set_config(job_config)


def record_files(job_config: DictConfig) -> dict[str, str]:
    """Return the files that Hydra's `run_job` writes into hydra.output_subdir: path below the job's folder to text."""
    node = job_config.hydra
    if node.output_subdir is None:
        return {}
    contents = {
        "config": without_hydra(job_config),
        "hydra": OmegaConf.create({"hydra": node}),
        "overrides": node.overrides.task,
    }
    return {
        f"{node.output_subdir}/{name}.yaml": yaml.dump(
            OmegaConf.to_container(content, enum_to_str=True), Dumper=_Dumper, sort_keys=False
        )
        for name, content in contents.items()
    }
