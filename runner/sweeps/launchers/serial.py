"""The default launcher: jobs one after the other in this process, sharing the base model, the data and the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.config.invocation import Invocation
from runner.sweeps.compose import JobComposer
from runner.sweeps.job import differing_overrides, run_job, split_overrides

_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def launch(
    jobs: Sequence[Sequence[str]], *, context: HydraContext, config: DictConfig, invocation: Invocation
) -> list[JobReturn]:
    """Run `jobs`, each a list of overrides with its hydra.sweep.subdir; a failed one does not stop the others.

    Jobs of the same base and data run next to each other, whatever their numbers, so that each is loaded once.

    Raises:
        SystemExit: a signal asked the process to stop; the job in progress has saved.
    """
    from runner.backends.cpu import blas

    blas.load_blas()  # before MLX is imported
    from runner.training.shared import SharedComponents

    composer, shared = JobComposer(context.config_loader, config), SharedComponents()
    sweep = Path(config.hydra.sweep.dir)
    HydraConfig.instance().set_config(config)  # for ${hydra:…} in a config of one's own
    needs = [_needs(composer, words) for words in jobs]
    rank = {need: i for i, need in reversed(list(enumerate(needs)))}  # of each need its first appearance
    order = sorted(range(len(jobs)), key=lambda i: rank[needs[i]])
    own_words = differing_overrides([split_overrides(words)[0] for words in jobs])
    returns: list[JobReturn | None] = [None] * len(jobs)
    for i in order:
        overrides, own = split_overrides(jobs[i])
        done = returns[i] = JobReturn()
        done.overrides = overrides
        try:
            cfg = composer.compose(overrides)
            node = composer.hydra_node(overrides)
            number, folder = int(own["hydra.sweep.subdir"]), sweep / own["hydra.sweep.subdir"]
            if own.get("hydra.output_subdir") != "null":
                _record(cfg, node, overrides, number, folder)
            done.cfg = cfg
            done.return_value = run_job(
                cfg,
                folder,
                number=number,
                label=own_words[i],
                experiment=node.runtime.choices.get("experiment"),
                stop_at=invocation.stop_at,
                shared=shared,
            )
            done.status = JobStatus.COMPLETED
        except Exception as error:
            done.return_value, done.status = error, JobStatus.FAILED
    return [done for done in returns if done is not None]


def _needs(composer: JobComposer, words: Sequence[str]) -> tuple[str, str]:
    """What has to be loaded for the job: its model and its data."""
    config = composer.compose(split_overrides(words)[0])
    return repr(config.model), repr(config.data)


def _record(cfg: DictConfig, node: DictConfig, overrides: list[str], number: int, folder: Path) -> None:
    """Hydra's own record of the job in .hydra/."""
    record = folder / ".hydra"
    record.mkdir(parents=True, exist_ok=True)
    with read_write(node), open_dict(node):
        node.job.num = node.job.id = number
        node.overrides.task = overrides
        node.runtime.output_dir = str(folder)
    for name, content in (("config.yaml", cfg), ("overrides.yaml", overrides), ("hydra.yaml", {"hydra": node})):
        node_ = content if isinstance(content, DictConfig) else OmegaConf.create(content)
        plain = OmegaConf.to_container(node_, enum_to_str=True)
        (record / name).write_text(yaml.dump(plain, Dumper=_Dumper, sort_keys=False), encoding="utf-8")
