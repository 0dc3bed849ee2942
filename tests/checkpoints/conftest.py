"""A checkpoint store in an empty folder, and the fixtures of tests/disk_fixtures.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from disk_fixtures import folder, killed, power_cut, tape, unsynced  # noqa: F401  # pytest finds fixtures by name

from runner.checkpoints.store import CheckpointStore


@pytest.fixture
def store(folder: Path) -> CheckpointStore:  # noqa: F811
    return CheckpointStore(folder / "checkpoints", "run-1")
