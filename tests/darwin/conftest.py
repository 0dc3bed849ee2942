"""The command line in a simulated macOS."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment", Path(__file__).parent / "environment.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def simulated_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a simulated macOS; see simulated_macos.py."""
    return _environment().make_environment(tmp_path_factory.mktemp("macos") / "venv")
