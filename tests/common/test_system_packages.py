"""Advice names the package manager that the machine has, and none that it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.common.system_packages import install_hint

PACKAGES = {"apt-get": "libopenblas0-pthread", "dnf": "openblas-threads"}


@pytest.mark.parametrize(
    ("has", "hint"),
    [
        (["apt-get"], " (apt-get install libopenblas0-pthread)"),
        (["dnf", "pacman"], " (dnf install openblas-threads)"),
        (["pacman"], ""),
        ([], ""),
    ],
)
def test_the_command_is_that_of_the_package_manager_on_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has: list[str], hint: str
) -> None:
    for name in has:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install_hint(PACKAGES) == hint
