"""Composing an imported command the way the program does: through the door's reading of its words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runner import config
from runner.migrate.carry import Carried


def compose(carried: Carried) -> config.Config:
    from hydra import compose, initialize_config_dir

    from runner import words
    from runner.app import checked, register

    said = words.read(carried.overrides)
    register()
    with initialize_config_dir(str(words.CONF), version_base="1.3"):
        return checked(compose("config", overrides=said.words))


@pytest.fixture(scope="session", name="compose")
def _compose() -> Callable[[Carried], config.Config]:
    return compose
