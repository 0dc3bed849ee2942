"""GGUF files, the small model's file and what independent readers found in it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def gguf_files() -> ModuleType:
    """tests/gguf_files.py."""
    spec = importlib.util.spec_from_file_location("gguf_files", HERE.parent / "gguf_files.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference() -> dict[str, Any]:
    """Token ids, log-probabilities and answers that other readers of the small model's file gave.

    Written by reference/make_reference.py.
    """
    return json.loads((HERE / "reference" / "smollm2_135m.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The small model's GGUF file."""
    from runner.models.fetch import fetch_model

    return fetch_model("smollm2_135m")
