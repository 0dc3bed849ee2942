"""The build of MLX, known without importing it: what a launcher that never computes decides by."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from runner.backends import mlx_build


@pytest.mark.parametrize(
    ("system", "machine", "packages", "build", "gpu"),
    [
        ("darwin", "arm64", {"mlx", "mlx-metal"}, "metal", True),
        ("darwin", "x86_64", {"mlx"}, "own", False),
        ("linux", "x86_64", {"mlx", "mlx-cpu"}, "cpu", False),
        ("linux", "aarch64", {"mlx", "mlx-cuda-13"}, "cuda", True),
        ("linux", "x86_64", {"mlx", "mlx-cuda-12"}, "cuda", True),
        ("linux", "x86_64", {"mlx", "mlx-cpu", "mlx-cuda-13"}, "cuda", True),
        ("linux", "x86_64", {"mlx"}, "missing", False),
        ("linux", "x86_64", set(), "own", False),
    ],
)
def test_the_build_follows_from_the_system_and_the_installed_packages(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    system: str,
    machine: str,
    packages: set[str],
    build: str,
    gpu: bool,
) -> None:
    class Package:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(mlx_build, "installed", lambda name: Package() if name in packages else None)
    assert (mlx_build.mlx_build(), mlx_build.is_gpu_build()) == (build, gpu)


def test_the_answer_is_that_of_mlx_itself() -> None:
    from runner.models.device import on_cpu

    assert mlx_build.is_gpu_build() != on_cpu()
