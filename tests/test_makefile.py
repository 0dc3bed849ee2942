"""`make setup` on machines where no Python fits, and the make targets that continuous integration calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
INTEL = "import platform, sys; sys.platform = 'darwin'; platform.machine = lambda: 'x86_64'"
BARE = "import sys; sys.modules['ensurepip'] = None"
OLD = "import sys; sys.version_info = (3, 9, 6)"


@pytest.fixture
def make_setup(tmp_path: Path):
    """`make_setup(PROGRAM=script, …)`: the error output of `make setup` where PATH has these programs and no other
    Python; a script that is no shell script is what each Python executes first."""

    def run(**programs: str) -> str:
        programs = {name.replace("_", "-"): script for name, script in programs.items()}
        python = programs.pop("python")
        scripts = {
            name: f'#!/bin/sh\n[ "$1" = -c ] && exec "{sys.executable}" -c "{python}\n$2"\n'
            for name in ("python3.13", "python3.12", "python3.11", "python3")
        }
        path = tmp_path / "bin"
        path.mkdir()
        for name, script in {**scripts, **programs}.items():
            (path / name).write_text(script)
            (path / name).chmod(0o755)
        (path / "cat").symlink_to(str(shutil.which("cat")))
        environment = {**os.environ, "PATH": str(path)}
        words = [str(shutil.which("make")), "setup", f"VENV={tmp_path}/venv"]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and not (tmp_path / "venv").exists(), done.stdout + done.stderr
        return next(line for line in done.stderr.splitlines() if line.startswith("setup: "))

    return run


def test_a_python_for_intel_on_apple_silicon_is_named_as_such(make_setup):
    error = make_setup(python=INTEL, sysctl='#!/bin/sh\n[ "$2" = hw.optional.arm64 ] && echo 1\n', brew="#!/bin/sh\n")
    assert "python3.13 is a Python for Intel, which Rosetta translates" in error
    assert "(brew install python@3.12)" in error


def test_a_mac_with_an_intel_processor_is_named_as_such(make_setup):
    assert "needs a Mac with Apple Silicon" in make_setup(python=INTEL, sysctl="#!/bin/sh\nexit 1\n")


@pytest.mark.parametrize("manager", ["apt-get", None])
def test_a_python_without_venv_is_named_with_the_command_of_this_system_only(make_setup, manager):
    error = make_setup(python=BARE, **({"apt_get": "#!/bin/sh\n"} if manager else {}))
    assert "python3.13 cannot make virtual environments" in error
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (f"apt-get install python{version}-venv" in error) == bool(manager)


def test_without_a_python_that_fits_the_versions_are_named(make_setup):
    error = make_setup(python=OLD)
    assert "no Python 3.11, 3.12 or 3.13 that runs on PATH" in error and "brew" not in error


def test_continuous_integration_calls_make_targets_that_exist_on_both_systems_and_every_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    called = [word for step in job["steps"] for word in re.findall(r"^make (\S+)", step.get("run", ""))]
    assert called == ["check", "test"]
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(called) <= targets
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert [system.partition("-")[0] for system in matrix["os"]] == ["ubuntu", "macos"]
