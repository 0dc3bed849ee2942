"""hydra.sweeper.params: values of a sweep that stand in a recipe, in the grammar of overrides or as lists."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from runner.common.errors import ConfigError
from runner.config.schema import GROUPS
from runner.sweeps import grid
from runner.sweeps.job_composer import JobComposer


def expand(arguments: Sequence[str], params: Mapping[str, Any], composer: JobComposer) -> list[tuple[str, ...]]:
    """Return the overrides of every job of a new sweep of `arguments`, with the `params` of its config.

    Where recipes are swept that are sweeps themselves, each brings the values of its own params.
    """
    texts = [*param_overrides(params, composer), *arguments]
    typed = {grid.override_key(argument) for argument in arguments}
    expanded: list[tuple[str, ...]] = []
    for overrides in grid.expand_grid([composer.parse(text) for text in texts]):
        own = composer.compose(overrides).params
        expanded += [overrides] if own == params else with_params(overrides, own, typed, composer)
    if len(expanded) > grid.MAX_JOBS:
        raise ConfigError(f"A sweep of more than {grid.MAX_JOBS:,} jobs is refused: try fewer values at once.")
    return expanded


def with_params(
    overrides: Sequence[str], params: Mapping[str, Any], typed: set[str], composer: JobComposer
) -> list[tuple[str, ...]]:
    """Return `overrides` with each combination of the values of `params`, which replace others than those `typed`."""
    more = [text for text in param_overrides(params, composer) if grid.override_key(text) not in typed]
    replaced = {grid.override_key(text) for text in more}
    others = [text for text in overrides if grid.override_key(text) not in replaced]
    return [(*others, *values) for values in grid.expand_grid([composer.parse(text) for text in more])]


def param_overrides(params: Mapping[str, Any], composer: JobComposer) -> list[str]:
    """Return `params` as overrides; a group of one's own and a value below vars get the `+` that Hydra needs."""
    overrides = []
    for key, value in params.items():
        if OmegaConf.is_list(value) or isinstance(value, (list, tuple)):
            text = ",".join(json.dumps(item) if isinstance(item, str) else str(item) for item in value)
        else:
            text = str(value)
        own_group = key not in GROUPS and composer.has_group(key)
        overrides.append(f"{'+' if own_group else '++' if key.startswith('vars.') else ''}{key}={text}")
    return overrides
