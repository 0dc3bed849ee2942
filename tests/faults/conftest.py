"""Faults for real: a preloaded library, a driver that kills its own process, and a line a row at the end.

`make faults` runs these tests with the full counts (RUNNER_FAULTS=full); `make test` runs fewer cases of each.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
FULL = os.environ.get("RUNNER_FAULTS") == "full"


def _rows() -> dict[int, str]:
    spec = importlib.util.spec_from_file_location("fault_rows", HERE / "rows.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ROWS


ROWS = _rows()


class Cases:
    """How many cases a test runs, and how many it ran."""

    full = FULL

    def __init__(self) -> None:
        self.ran: int | None = None

    def of(self, full: int, quick: int) -> int:
        """The number of cases to run."""
        return full if FULL else quick

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


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    told = _tally(terminalreporter)
    if not told:
        return
    terminalreporter.section("faults, " + ("full counts" if FULL else "small counts"))
    terminalreporter.write_line("row   cases  failed  seconds")
    for row, text in ROWS.items():
        cases, failed, skipped, seconds = told.get(row, (0, 0, 0, 0.0))
        mark = "" if cases and not failed and not skipped else "  <-- NOT PROVEN" + (" (skipped)" if skipped else "")
        terminalreporter.write_line(f"{row:3d} {cases:7,d} {failed:7d} {seconds:8.1f}  {text}{mark}")


def _tally(reporter: Any) -> dict[int, tuple[int, int, int, float]]:
    told: dict[int, list[float]] = defaultdict(lambda: [0, 0, 0, 0.0])
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in reporter.stats.get(outcome, []):
            for rows, ran in (value for name, value in getattr(report, "user_properties", []) if name == "fault"):
                for row in rows:
                    told[row][0] += ran if report.outcome == "passed" else 0
                    told[row][1] += report.outcome == "failed"
                    told[row][2] += report.outcome == "skipped"
                    told[row][3] += report.duration
    return {row: (int(a), int(b), int(c), d) for row, (a, b, c, d) in told.items()}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With full counts, a row without a test that passed is a failure of its own."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not FULL or reporter is None or hasattr(session.config, "workerinput") or exitstatus != 0:
        return
    told = _tally(reporter)
    if any(told.get(row, (0, 0, 0))[0] == 0 or told[row][2] for row in ROWS):
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


@pytest.fixture
def faulty(shim: Path) -> Any:
    """`faulty(under, calls="write,fsync", at=3, do="kill")`: the environment of a process that meets that fault."""

    def make(
        under: Path | None = None,
        *,
        name: str = "",
        calls: str = "open,write,fsync,close,rename,mkdir,remove",
        at: int = -1,
        do: str | int = "",
        for_good: bool = False,
        log: Path | None = None,
        clock: str = "",
    ) -> dict[str, str]:
        words = {
            "LD_PRELOAD": str(shim),
            "FAULT_UNDER": str(under.resolve()) if under else "",
            "FAULT_NAME": name,
            "FAULT_CALLS": calls,
            "FAULT_AT": str(at),
            "FAULT_DO": str(do),
            "FAULT_FOR_GOOD": "1" if for_good else "",
            "FAULT_LOG": str(log) if log else "",
            "FAULT_CLOCK": clock,
        }
        return {key: value for key, value in words.items() if value}

    return make


@pytest.fixture
def driven() -> Any:
    """`driven(door, "micro-batch", 17, *words)`: the program, SIGKILLed by itself at the 17th micro-batch."""

    def start(door: Any, point: str, at: int, *words: str, number: str = "SIGKILL") -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "driver.py"), point, str(at), number, *words]
        return subprocess.Popen(
            command,
            cwd=door.folder,
            env=door.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start
