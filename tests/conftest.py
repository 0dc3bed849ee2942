"""Fixtures for many tests: runs of the tiny model in this process, and the command line as a process of its own."""

from __future__ import annotations

import atexit
import contextlib
import csv
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from forked_program import READ_WHILE_IMPORTING, ForkedProgram, popen_that_forks, read_while_importing
from hypothesis import settings as hypothesis_settings

from runner.backends import blas
from runner.config import serialize, validation
from runner.config.schema import Config
from runner.runs.directory import RunDirectory
from runner.runs.run_spec import RunSpec, find_resume_source, new_run_id

# Some GPUs (CUDA, Apple's since M5) multiply float32 in TF32 unless told otherwise; tests compare it with tolerances
# far below its 10 bits. Before any test imports MLX, and inherited by the processes that tests start.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
blas.load_blas(jobs=os.cpu_count() or 1)  # before any test imports MLX

# A busy machine is no failure.
hypothesis_settings.register_profile("no deadline", deadline=None)
hypothesis_settings.load_profile("no deadline")

ROOT = Path(__file__).resolve().parent.parent
VOLATILE = ("time", "tokens_per_second", "peak_memory_gb", "active_memory_gb", "cache_memory_gb")
"""Fields of a metrics row in which two equal runs may differ."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `cpu` where MLX computes on a GPU, and give what they need as the reason."""
    marked = [(item, marker) for item in items if (marker := item.get_closest_marker("cpu"))]
    if not marked:
        return
    from runner.models.device import on_cpu

    if not on_cpu():
        for item, marker in marked:
            item.add_marker(pytest.mark.skip(reason=f"MLX computes on a GPU here: {marker.args[0]}"))


def changed(settings: Config, changes: dict[str, Any]) -> Config:
    """`settings` with dotted names set."""
    for name, value in changes.items():
        *path, last = name.split(".")
        section: Any = settings
        for part in path:
            section = getattr(section, part)
        assert hasattr(section, last), name
        setattr(section, last, value)
    return settings


@pytest.fixture
def tiny() -> Callable[..., Config]:
    """A small, complete config of the tiny model: `tiny(**{"lora.rank": 4})`."""

    def make(**changes: Any) -> Config:
        settings = Config()
        small = {
            "model.path": "builtin:tiny",
            "data.path": "builtin:tiny",
            "data.max_length": 128,
            "optimizer.name": "adamw",
            "optimizer.learning_rate": 1e-3,
            "schedule.name": "constant",
            "train.iters": 12,
            "train.report_every": 5,
            "train.eval_every": 6,
            "checkpoint.every": 4,
        }
        settings = changed(settings, small | changes)
        validation.validate(settings)
        return validation.fill_defaults(settings)

    return make


@pytest.fixture
def train() -> Callable[..., Path]:
    """Train in this process: `train(settings, folder)`; `resume=path` continues from there, and jobs of a sweep share
    a `ComponentLoader`."""

    def do(
        settings: Config, folder: Path, resume: Path | None = None, loader: Any = None, stop_at: int | None = None
    ) -> Path:
        from runner.training.run import train_run

        source = find_resume_source(resume) if resume else None
        directory = RunDirectory(folder, settings.checkpoint.dir)
        if source is None or source.branch:
            directory.claim()
        start = RunSpec(settings, serialize.to_dict(settings), directory, source, new_run_id(), stop_at=stop_at)
        train_run(start, loader)
        return folder

    return do


@pytest.fixture(scope="session")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return tmp_path_factory.mktemp("trained"), {}


@pytest.fixture
def train_once(train: Callable[..., Path], _trained: tuple[Path, dict[str, Path]]) -> Callable[[Config, Path], Path]:
    """As `train`, for tests of what is done with a run: equal settings are trained once, `folder` is a copy."""

    def do(settings: Config, folder: Path) -> Path:
        parent, made = _trained
        key = json.dumps(serialize.to_dict(settings))
        if key not in made:
            made[key] = train(settings, parent / str(len(made)))
        return shutil.copytree(made[key], folder, symlinks=True)

    return do


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RUNNER_CACHE", str(folder))
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the metrics rows of a run without the fields that depend on time and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in VOLATILE} for line in lines]


def assert_equal_runs(first: Path, second: Path) -> None:
    """Assert that two runs are equal: weights, optimizer, random state, data position, learning rates, metrics rows,
    losses of the evaluated rows."""
    assert rows(first) == rows(second)
    last = sorted(p.name for p in (first / "checkpoints").glob("step-*"))[-1]
    for name in ("adapters.safetensors", "optimizer.safetensors", "unaveraged.safetensors"):
        files = [run / "checkpoints" / last / name for run in (first, second)]
        contents = [file.read_bytes() if file.exists() else None for file in files]
        assert contents[0] == contents[1], name
    states = [json.loads((run / "checkpoints" / last / "train_state.json").read_text()) for run in (first, second)]
    for name in ("step", "position", "random_state", "progress", "metrics"):
        assert states[0][name] == states[1][name], name
    # The offsets are in bytes, and rows hold times of different lengths: equal runs have as many rows before them.
    files = ("metrics.jsonl", "samples.jsonl", "row_losses.jsonl")
    for file in files:
        name = file.replace(".jsonl", "_offset")
        counts = [rows_before(run / file, state[name]) for run, state in zip((first, second), states, strict=True)]
        assert counts[0] == counts[1], name
    row_losses = [file.read_bytes() if (file := run / "row_losses.jsonl").exists() else None for run in (first, second)]
    assert row_losses[0] == row_losses[1]
    results = [(run / "adapters" / "adapters.safetensors").read_bytes() for run in (first, second)]
    assert results[0] == results[1]


def rows_before(file: Path, offset: int) -> int:
    """Count the rows of `file` before `offset`, which must be the end of a row."""
    data = file.read_bytes()[:offset] if file.exists() else b""
    assert len(data) == offset and (not data or data.endswith(b"\n")), f"{file}: {offset} is inside a row"
    return data.count(b"\n")


@pytest.fixture(name="assert_equal_runs")
def _assert_equal_runs() -> Callable[[Path, Path], None]:
    return assert_equal_runs


@pytest.fixture(name="rows")
def _rows() -> Callable[[Path], list[dict[str, Any]]]:
    return rows


@functools.cache
def _forked_program(python: str, imported_with: frozenset[tuple[str, str]] | None = None) -> ForkedProgram:
    """What forks programs of `python`; `imported_with`: the variables that packages read, None for the usual ones."""
    environment = CommandLine(Path()).environment
    if imported_with is not None:
        usual = {name: value for name, value in environment.items() if not READ_WHILE_IMPORTING.match(name)}
        environment = usual | dict(imported_with)
    program = ForkedProgram(environment, python)
    atexit.register(program.close)
    return program


def _hear_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class CommandLine:
    """The program as a user runs it, in the working directory `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "120"}
        self.environment.pop("RUNNER_TRACEBACK", None)
        self.python = sys.executable
        self.imports_for_itself = False
        """Whether many commands have this environment, with variables that packages read while they are imported: they
        are forked from a process of their own."""

    def start(
        self, *arguments: str, words: Sequence[str] = ("-m", "runner"), fork: bool = True, **options: Any
    ) -> subprocess.Popen[str]:
        """Start the program and return its process.

        Args:
            words: what follows `python` before the arguments.
            fork: whether it may be forked from a process that has imported its packages.
        """
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
        options |= {"cwd": self.folder, "env": {**self.environment, **options.get("env", {})}}
        if fork and (forked := self._forked(options["env"])):
            return forked.start(*words, *arguments, **options)  # type: ignore[return-value]
        # Tests that run in the background ignore Ctrl-C and the loss of a terminal, which a child would inherit.
        return subprocess.Popen([self.python, *words, *arguments], preexec_fn=_hear_signals, **options)

    def _forked(self, environment: dict[str, str]) -> ForkedProgram | None:
        """Return what forks programs with `environment`, if there is one."""
        program = _forked_program(str(self.python))
        if self.imports_for_itself or "LD_PRELOAD" in environment:
            program = _forked_program(str(self.python), frozenset(read_while_importing(environment).items()))
        return program if program.accepts(environment) else None

    def __call__(self, *arguments: str, expect: int = 0, env: dict[str, str] | None = None) -> str:
        """Run the program to its end, assert that its exit code is `expect`, and return its output."""
        process = self.start(*arguments, env=env or {})
        output, _ = process.communicate(timeout=600)
        assert process.returncode == expect, f"exit code {process.returncode}\n{output}"
        return output

    def wait_for(self, run: Path, step: int, process: subprocess.Popen[str]) -> int:
        """Wait until `run` has reported `step`, and return the pid in its status."""
        for _ in range(6000):
            assert process.poll() is None, process.communicate()[0]
            try:
                status = json.loads((run / "status.json").read_text())
                if status["step"] >= step:
                    return status["pid"]
            except (OSError, ValueError, KeyError):
                pass
            time.sleep(0.01)
        raise AssertionError(f"{run} did not reach step {step}")

    @staticmethod
    def results(sweep: Path) -> dict[int, dict[str, str]]:
        """Return the rows of a sweep's results.csv by job number."""
        with (sweep / "results.csv").open() as lines:
            return {int(row["job"]): row for row in csv.DictReader(lines)}


class CommandLineInProcess(CommandLine):
    """The same without a process for each command, so that Python's imports are paid once; `start` still makes one."""

    def __call__(self, *arguments: str, expect: int = 0, env: dict[str, str] | None = None) -> str:
        """Run the program to its end, assert that its exit code is `expect`, and return its output."""
        if env:
            return super().__call__(*arguments, expect=expect, env=env)
        from runner.cli.main import main

        output = io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            patch.chdir(self.folder)
            for name in ("PYTHONPATH", "OPENBLAS_NUM_THREADS", "COLUMNS"):
                patch.setenv(name, self.environment[name])
            patch.delenv("RUNNER_TRACEBACK", raising=False)
            patch.setattr(subprocess, "Popen", popen_that_forks(_forked_program(self.python)))
            code = main(arguments)
        assert code == expect, f"exit code {code}\n{output.getvalue()}"
        return output.getvalue()


@pytest.fixture(autouse=True)
def _environment_ends_with_the_test() -> Iterator[None]:
    """What a command in this process sets, such as HF_HUB_OFFLINE, would be passed on to all later ones."""
    before = read_while_importing(os.environ)
    yield
    for name in read_while_importing(os.environ).keys() | before.keys():
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture(scope="session")
def make_cli() -> Callable[..., CommandLine]:
    """`make_cli(folder, in_process=True)`: the command line, `cli` or `inline`, in a folder of the test's choice."""

    def make(folder: Path, in_process: bool = False) -> CommandLine:
        folder.mkdir(parents=True, exist_ok=True)
        return CommandLineInProcess(folder) if in_process else CommandLine(folder)

    return make


@pytest.fixture
def cli(tmp_path: Path) -> CommandLine:
    """`cli("model=tiny", …)` runs the program in a temporary folder."""
    return CommandLine(tmp_path)


@pytest.fixture
def inline(tmp_path: Path) -> CommandLineInProcess:
    """As `cli`, but the program runs in this process: for tests that need no process of its own."""
    return CommandLineInProcess(tmp_path)
