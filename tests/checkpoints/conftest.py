"""The instruments of tests/instruments.py as fixtures, and a store in an empty folder.

No test here waits for a real disk: what was synced when is on the tape.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

import runner.common.filesystem as disk_module
from runner.checkpoints.store import CheckpointStore


def _instruments() -> Any:
    spec = importlib.util.spec_from_file_location("instruments", Path(__file__).parents[1] / "instruments.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["instruments"] = module
    spec.loader.exec_module(module)
    return module


instruments = _instruments()


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "os", instruments.Unsynced())
    monkeypatch.setattr(disk_module, "_FULL_SYNC", None)


@pytest.fixture
def tape() -> type:
    return instruments.Tape


@pytest.fixture
def power_cut() -> type:
    return instruments.PowerCut


@pytest.fixture
def killed() -> type[BaseException]:
    return instruments.Killed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder without a link in its path."""
    found = tmp_path.resolve() / "run"
    found.mkdir()
    return found


@pytest.fixture
def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", "run-1")
