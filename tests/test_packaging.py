"""The wheel holds what a run needs, and works far away from the source tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_config_data_set_and_plugin_file(wheel: Path) -> None:
    shipped = set(zipfile.ZipFile(wheel).namelist())
    assert not any(name.startswith(("tools/", "tests/", "benchmarks/")) for name in shipped)
    here = {f"runner/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    here |= {str(path.relative_to(ROOT)) for path in (ROOT / "runner").rglob("*.py")}
    here |= {str(path.relative_to(ROOT)) for path in (ROOT / "runner" / "data" / "sets").rglob("*.jsonl")}
    here |= {str(path.relative_to(ROOT)) for path in (ROOT / "runner" / "reports" / "assets").iterdir()}
    here |= {str(path.relative_to(ROOT)) for path in (ROOT / "hydra_plugins").rglob("*.py")}
    assert "runner/conf/config.yaml" in here and any(name.endswith(".jsonl") for name in here)
    assert here <= shipped, sorted(here - shipped)
    assert "hydra_plugins/__init__.py" not in shipped
    assert not [name for name in shipped if name.startswith(("tests/", "outputs/", "conf/"))]


def test_constraints_pin_plain_versions_and_agree_with_the_project() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name + version) for name, version in pins.items())
    known = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = [need for needs in PROJECT["optional-dependencies"].values() for need in needs]
    for need in [*PROJECT["dependencies"], *extras]:
        name = re.split(r"[^A-Za-z0-9_-]", need)[0].lower()
        assert name in known, f"{name} is not pinned in constraints.txt"
        if exact := re.search(r"==([0-9.]+)", need):
            assert known[name] == exact[1]


def test_no_set_of_plain_dependencies_brings_a_second_mlx_backend() -> None:
    assert not [need for need in PROJECT["dependencies"] if re.match(r"mlx(\[|-cpu|-cuda)", need)]
    assert "mlx[cpu]" in PROJECT["optional-dependencies"]["cpu"]
    assert PROJECT["optional-dependencies"]["cuda"] == ["mlx[cuda13]"]


@pytest.fixture(scope="module", params=["borrowed", pytest.param("its own", marks=pytest.mark.long)])
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of an environment that holds the wheel, and its dependencies: what it asks for and nothing
    else, or those of this environment (a path that is added so reads no ``.pth`` file, no editable install)."""
    folder = tmp_path_factory.mktemp("installed")
    own = request.param == "its own"
    venv.create(folder, with_pip=False)
    words = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    words += ["--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt")]
    words += [f"{wheel}[cpu]"] if own else ["--no-deps", str(wheel)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if not own:
        (packages,) = (folder / "lib").glob("python*/site-packages")
        (packages / "borrowed.pth").write_text(f"{distribution('mlx-lm').locate_file('')}\n")
    return folder / "bin"


def run_elsewhere(folder: Path, *words: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_installed_wheel_imports_with_its_config_and_plugins(installed: Path, tmp_path: Path) -> None:
    code = (
        "import runner, hydra_plugins.mlx_runner, mlx.core, pathlib;"
        "print((pathlib.Path(runner.__file__).parent / 'conf' / 'config.yaml').is_file(), runner.__file__)"
    )
    found, where = run_elsewhere(tmp_path, str(installed / "python"), "-c", code).split(maxsplit=1)
    assert found == "True" and where.startswith(str(installed.parent))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_installed_command_answers_from_any_folder(installed: Path, tmp_path: Path) -> None:
    assert "resume=" in run_elsewhere(tmp_path, str(installed / "runner"), "--help")
    composed = run_elsewhere(tmp_path, str(installed / "runner"), "--cfg", "job")
    assert re.search(r"^lora:\n", composed, re.MULTILINE) and "learning_rate" in composed
    assert not list(tmp_path.iterdir()), "asking writes nothing"
