"""Composing an imported command the way the program does: through the parser of the command line."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runner.config import groups, schema
from runner.migrate.result import ImportResult


def compose(carried: ImportResult) -> schema.Config:
    from hydra import compose, initialize_config_dir

    from runner.app.compose import register_schema
    from runner.app.resolve import resolve_config
    from runner.cli import overrides

    said = overrides.parse_arguments(carried.overrides)
    register_schema()
    with initialize_config_dir(str(groups.CONF_DIR), version_base="1.3"):
        return resolve_config(compose("config", overrides=said.arguments))


@pytest.fixture(scope="session", name="compose")
def _compose() -> Callable[[ImportResult], schema.Config]:
    return compose
