"""Fixtures for tests of file systems: the instruments of tests/instruments.py, and an empty folder.

No test that uses them waits for a real disk: what was synced when is on the tape.
"""

from __future__ import annotations

from pathlib import Path

import instruments
import pytest

from runner.common import filesystem


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make fsync return at once."""
    monkeypatch.setattr(filesystem, "os", instruments.Unsynced())
    monkeypatch.setattr(filesystem, "_FULL_SYNC", None)


@pytest.fixture
def tape() -> type[instruments.Tape]:
    """`with tape(…) as calls`: record the system calls that change the disk, stop at one, or make one fail."""
    return instruments.Tape


@pytest.fixture
def power_cut() -> type[instruments.PowerCut]:
    """`power_cut(folder)`: a model of a disk that loses what was not synced."""
    return instruments.PowerCut


@pytest.fixture
def killed() -> type[BaseException]:
    """The exception with which a tape ends a process."""
    return instruments.Killed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder without a link in its path."""
    path = tmp_path.resolve() / "run"
    path.mkdir()
    return path
