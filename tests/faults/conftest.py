"""Fixtures that inject faults, and a summary with one line for each row of rows.py at the end.

`make faults` runs these tests with the full counts (RUNNER_FAULTS=full); `make test` runs fewer cases of each.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
FULL = os.environ.get("RUNNER_FAULTS") == "full"


def load(path: Path) -> Any:
    """The module in the file `path`."""
    spec = importlib.util.spec_from_file_location(f"faults_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ROWS = load(HERE / "rows.py").ROWS


class Cases:
    """How many cases a test runs, and how many it ran."""

    full = FULL

    def __init__(self) -> None:
        self.ran: int | None = None

    def of(self, full: int, quick: int) -> int:
        """The number of cases to run."""
        return full if FULL else quick

    def some(self, faults: Sequence[Any], quick: int) -> list[Any]:
        """All of `faults`, or `quick` of them, spread evenly."""
        if FULL or len(faults) <= quick:
            return list(faults)
        return [faults[(2 * i + 1) * len(faults) // (2 * quick)] for i in range(quick)]

    def done(self, number: int = 1) -> None:
        """Count `number` cases that held; a test that never calls this counts as one."""
        self.ran = (self.ran or 0) + number


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Cases:
    found = Cases()
    request.node.fault_cases = found
    return found


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    outcome = yield
    mark = item.get_closest_marker("fault")
    if mark is None:
        return
    report = outcome.get_result()
    counted = getattr(item, "fault_cases", None)
    ran = 1 if counted is None or counted.ran is None else counted.ran
    report.user_properties.append(("fault", (list(mark.args), ran if report.when == "call" else 0)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test whose cases are divided among workers, `make test` runs the first part: its counts are small."""
    for item in items:
        if getattr(item, "callspec", None) is not None and item.callspec.params.get("chunk", 0):
            item.add_marker(pytest.mark.long)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    tally = _tally(terminalreporter)
    if not tally:
        return
    terminalreporter.section("faults, " + ("full counts" if FULL else "small counts"))
    terminalreporter.write_line("row   cases  failed  seconds")
    for row, text in ROWS.items():
        if row not in tally and not FULL:
            continue
        cases, failed, skipped, seconds = tally.get(row, (0, 0, 0, 0.0))
        mark = "" if cases and not failed and not skipped else "  <-- NOT PROVEN" + (" (skipped)" if skipped else "")
        terminalreporter.write_line(f"{row:3d} {cases:7,d} {failed:7d} {seconds:8.1f}  {text}{mark}")


def _tally(reporter: Any) -> dict[int, tuple[int, int, int, float]]:
    tally: dict[int, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in reporter.stats.get(outcome, []):
            for rows, ran in (value for name, value in getattr(report, "user_properties", []) if name == "fault"):
                for row in rows:
                    tally[row][0] += ran if report.outcome == "passed" else 0
                    tally[row][1] += report.outcome == "failed"
                    tally[row][2] += report.outcome == "skipped"
                    tally[row][3] += report.duration
    return {row: (int(a), int(b), int(c), d) for row, (a, b, c, d) in tally.items()}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With full counts, a row without a test that passed is a failure of its own."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not FULL or reporter is None or hasattr(session.config, "workerinput") or exitstatus != 0:
        return
    tally = _tally(reporter)
    if any(tally.get(row, (0, 0, 0))[0] == 0 or tally[row][2] for row in ROWS):
        session.exitstatus = 1


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preloaded library of shim.c, built."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("system calls are made to fail by a preloaded library: Linux with a C compiler")
    made = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(HERE / "shim.c"), "-ldl"], check=True)
    return made


@pytest.fixture(scope="session")
def fault_environment(shim: Path) -> Any:
    """`fault_environment(under, calls="write,fsync", at=3, do="kill")`: the environment that injects the fault."""

    def make(
        under: Path | None = None,
        *,
        name: str = "",
        calls: str = "open,write,fsync,close,rename,mkdir,remove",
        at: int = -1,
        do: str | int = "",
        for_good: bool = False,
        log: Path | None = None,
        tape: Path | None = None,
        clock: str = "",
    ) -> dict[str, str]:
        environment = {
            "LD_PRELOAD": str(shim),
            "FAULT_UNDER": str(under.resolve()) if under else "",
            "FAULT_NAME": name,
            "FAULT_CALLS": calls,
            "FAULT_AT": str(at),
            "FAULT_DO": str(do),
            "FAULT_FOR_GOOD": "1" if for_good else "",
            "FAULT_LOG": str(log) if log else "",
            "FAULT_TAPE": str(tape) if tape else "",
            "FAULT_CLOCK": clock,
        }
        return {key: value for key, value in environment.items() if value}

    return make


@pytest.fixture
def driven() -> Any:
    """`driven(cli, "micro-batch", 17, *overrides)`: the program, SIGKILLed by itself at the 17th micro-batch."""

    def start(
        cli: Any, point: str, at: int, *overrides: str, number: str = "SIGKILL", env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        return cli.start(*overrides, words=(str(HERE / "driver.py"), point, str(at), number), env=env or {})

    return start


@pytest.fixture(scope="session")
def instruments() -> Any:
    """The tape of system calls and the power cut: tests/instruments.py."""
    import instruments

    return instruments


@pytest.fixture(scope="session")
def overrides() -> tuple[str, ...]:
    """A short run in which nothing is missing: saves at 2, 4, 6 and 8; few arrays, since each is written by itself."""
    return (
        "model=tiny",
        "data=tiny",
        "schedule=cosine",
        "lora=query_value",
        "lora.num_layers=1",
        "lora.dropout=0.2",
        "optimizer.learning_rate=1e-3",
        "train.iters=8",
        "train.grad_accumulation=2",
        "train.report_every=3",
        "train.eval_every=5",
        "train.eval_tokens=1",  # several batches in an evaluation
        "train.cache_baseline=false",  # and one before the first update in each run
        "checkpoint.every=2",
        "checkpoint.keep_best=0",
    )


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, make_cli: Any) -> Callable[..., Path]:
    """`undisturbed(*overrides)`: the directory of a run that nothing stopped, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in made:
            cli = make_cli(tmp_path_factory.mktemp("undisturbed"))
            cli(*overrides, "hydra.run.dir=run")
            made[overrides] = cli.folder / "run"
        return made[overrides]

    return run


@pytest.fixture(scope="session")
def run_with_calls(
    tmp_path_factory: pytest.TempPathFactory, make_cli: Any, fault_environment: Any
) -> Callable[..., Any]:
    """`run_with_calls(*overrides)`: an undisturbed run, made once, and its calls (kind, path) that faults can hit."""
    made: dict[tuple[str, ...], tuple[Path, list[tuple[str, str]]]] = {}

    def run(*overrides: str) -> tuple[Path, list[tuple[str, str]]]:
        if overrides not in made:
            cli = make_cli(tmp_path_factory.mktemp("logged").resolve())
            folder, log = cli.folder / "run", cli.folder / "calls"
            cli(*overrides, "hydra.run.dir=run", env=fault_environment(folder, log=log))
            lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
            made[overrides] = folder, [(call, os.path.relpath(path, folder)) for call, path in lines]
        return made[overrides]

    return run


@pytest.fixture
def assert_ended_equal(assert_equal_runs: Any) -> Callable[[Path, Path], None]:
    """`assert_ended_equal(whole, run)`: the same bits, every checkpoint whole, and nothing left of what was cut off."""
    from runner.checkpoints.store import CheckpointStore

    def check(whole: Path, run: Path) -> None:
        assert_equal_runs(whole, run)
        assert json.loads((run / "status.json").read_text())["state"] == "finished"
        samples = [folder / "samples.jsonl" for folder in (whole, run)]
        assert samples[0].exists() == samples[1].exists()
        assert not samples[0].exists() or samples[0].read_bytes() == samples[1].read_bytes()
        names = [path.name for folder in (run, run / "checkpoints") for path in folder.iterdir()]
        assert [name for name in names if name.startswith(".") and name not in (".lock", ".hydra")] == []
        store = CheckpointStore(run / "checkpoints", "")
        for name in (name for name in names if name.startswith("step-")):
            store.load(run / "checkpoints" / name)

    return check


@pytest.fixture
def newest_checkpoint() -> Callable[[Path], Any]:
    """`newest_checkpoint(run)`: the newest checkpoint of the run that verifies, without any repair."""
    from runner.checkpoints.store import CheckpointStore

    def find(run: Path) -> Any:
        run_id = json.loads((run / "status.json").read_text())["run_id"]
        return CheckpointStore(run / "checkpoints", run_id).newest_valid()[0]

    return find


@pytest.fixture
def assert_same_state() -> Callable[..., None]:
    """`assert_same_state(loaded, whole)`: a checkpoint has the bytes of that run's of the same step, no mixture."""

    def check(loaded: Any, whole: Path, but: Sequence[str] = ()) -> None:
        folder = whole / "checkpoints" / loaded.checkpoint.path.name
        for name, data in loaded.files.items():
            ours, theirs = data, (folder / name).read_bytes()
            if name == "train_state.json":  # time shows in these fields
                ours, theirs = (json.loads(text) for text in (ours, theirs))
                for field in ("seconds", "metrics_offset", "samples_offset", *but):
                    ours.pop(field), theirs.pop(field)
            assert ours == theirs, name

    return check


@pytest.fixture(scope="session")
def _stopped(tmp_path_factory: pytest.TempPathFactory, make_cli: Any, overrides: tuple[str, ...]) -> Path:
    cli = make_cli(tmp_path_factory.mktemp("stopped"))
    cli(*overrides, "train.stop_at=6", "hydra.run.dir=run")
    return cli.folder / "run"


@pytest.fixture
def stopped(_stopped: Path, cli: Any) -> Path:
    """`run` in the folder of `cli`: the run of `overrides`, stopped after step 6, with checkpoints 2, 4 and 6."""
    return shutil.copytree(_stopped, cli.folder / "run")


@pytest.fixture
def contents() -> Callable[..., dict[str, Any]]:
    """`contents(folder, but=(".lock",))`: what lies below it, by path: bytes, where a link leads, or the kind."""

    def look(folder: Path, but: Sequence[str] = ()) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if name in but:
                continue
            if path.is_symlink():
                found[name] = ("link", os.readlink(path))
            else:
                found[name] = path.read_bytes() if path.is_file() else "folder" if path.is_dir() else "other"
        return found

    return look


@pytest.fixture
def reseal() -> Callable[..., None]:
    """`reseal(step_folder, metrics={…})`: a manifest that vouches for the files as they are now, with such changes."""
    from runner.checkpoints import manifest
    from runner.common import sealed_json

    def do(folder: Path, **changes: Any) -> None:
        record = json.loads((folder / manifest.NAME).read_text())
        record.pop("sha256")
        for name, about in record["files"].items():
            data = (folder / name).read_bytes()
            about.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        (folder / manifest.NAME).write_bytes(sealed_json.seal(record | changes))

    return do


@pytest.fixture(scope="session")
def hostile() -> Any:
    """`hostile.invoke(cli, *arguments)` and `hostile.measure(reader, paths, environment)`: see hostile.py."""
    return load(HERE / "hostile.py")


@pytest.fixture
def fresh_cli(make_cli: Any, tmp_path: Path) -> Callable[[], Any]:
    """`fresh_cli()`: a command line in a new folder with a new parent, so that files written beside it are seen."""
    numbers = itertools.count()
    return lambda: make_cli(tmp_path / str(next(numbers)) / "here")
