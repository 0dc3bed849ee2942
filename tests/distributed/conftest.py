"""Real ranks: processes that join over MLX's ring backend on this machine's loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from runner.common.free_ports import free_ports


class RankProcesses:
    """The processes of one run, by rank."""

    def __init__(self, cli: Any, processes: Sequence[subprocess.Popen[str]]) -> None:
        self.cli, self.processes = cli, list(processes)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a rank a signal."""
        self.processes[rank].send_signal(number)

    def wait(self, seconds: float = 120) -> list[str]:
        """Wait for the end of all, and return what each printed."""
        until = time.monotonic() + seconds
        try:
            return [process.communicate(timeout=max(0.1, until - time.monotonic()))[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()  # none is left behind by a test that failed

    @property
    def codes(self) -> list[int | None]:
        """Exit codes."""
        return [process.returncode for process in self.processes]


@pytest.fixture(scope="session")
def start_ranks() -> Callable[..., RankProcesses]:
    """`start_ranks(cli, 2, "model=tiny", …)`: start the program on so many ranks, as mlx.launch does; `words` are the
    program of each rank."""

    def start(cli: Any, count: int, *arguments: str, words: Sequence[tuple[str, str]] = ()) -> RankProcesses:
        hostfile = cli.folder / f"hosts-{time.monotonic_ns()}.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
        processes = []
        for rank in range(count):
            environment = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)} if count > 1 else {}
            program = {"words": words[rank]} if words else {}
            processes.append(cli.start(*arguments, env=environment, **program))
        return RankProcesses(cli, processes)

    return start


@pytest.fixture(scope="session")
def run_ranks(start_ranks: Callable[..., RankProcesses]) -> Callable[..., list[str]]:
    """As `start_ranks`, run to their end; asserts that each ends with `expect`, and returns what each printed."""

    def run(cli: Any, count: int, *words: str, expect: int = 0) -> list[str]:
        ranks = start_ranks(cli, count, *words)
        outputs = ranks.wait()
        assert ranks.codes == [expect] * count, "\n".join(outputs)
        return outputs

    return run


def losses(run: Path) -> list[tuple[Any, ...]]:
    """Return of each metrics row its loss, and before it what has to be equal whatever the number of ranks."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "split", "tokens", "supervised_tokens", "learning_rate", "epoch")
    return [(*(row.get(name) for name in names), row["loss"]) for row in rows if "loss" in row]


def assert_one_curve(first: Path, second: Path, tolerance: float = 1e-4) -> None:
    """Assert that two runs report the same, and losses within `tolerance`."""
    one, other = losses(first), losses(second)
    assert [row[:-1] for row in one] == [row[:-1] for row in other]
    assert max(abs(a[-1] - b[-1]) for a, b in zip(one, other, strict=True)) < tolerance
