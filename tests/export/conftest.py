"""GGUF files to export from."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def gguf_files() -> ModuleType:
    """tests/gguf_files.py."""
    path = Path(__file__).resolve().parents[1] / "gguf_files.py"
    spec = importlib.util.spec_from_file_location("gguf_files", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mixed_gguf(gguf_files: ModuleType, tmp_path: Path) -> Path:
    """A llama model as a GGUF file that contains every supported tensor type."""
    path: Path = gguf_files.tiny_llama(gguf_files.MIXED_TYPES, biases=True, tied=False).write(tmp_path / "tiny.gguf")
    return path
