"""`ranks=N`: a run starts its other ranks itself, on this machine, so that a job of a sweep can have several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from runner.common.errors import ConfigError, RankLost
from runner.common.free_ports import free_ports
from runner.config.invocation import Invocation
from runner.distributed.launch import Launch
from runner.training.world import World, join

_END_SECONDS = 10.0
"""How long the other ranks may take to end after this one."""
LOCAL_JOIN_SECONDS = 600.0
"""How long they may take to start: whether they live is known, so that the time is only for one that hangs."""
_has_joined = False
"""Whether this process has joined others: MLX connects a process once, for good."""


@contextmanager
def joined_world(invocation: Invocation) -> Iterator[World]:
    """Join the ranks that `invocation` was launched with or asks for, and yield the world of this process.

    Raises:
        ConfigError: it asks for ranks although it is one of several, or this process had some before.
        RankLost: a rank did not come.
    """
    global _has_joined
    with ExitStack() as stack:
        launch = invocation.launch
        if invocation.ranks is not None and invocation.ranks > 1:
            if launch is not None:
                raise ConfigError(
                    f"ranks={invocation.ranks} starts ranks, and this is one of {launch.size}: leave it out."
                )
            if _has_joined:
                raise ConfigError("ranks= needs a process for each run: MLX connects a process with others only once.")
            others = stack.enter_context(_OtherRanks(invocation.ranks))
            _has_joined = True
            world = join(others.launch, LOCAL_JOIN_SECONDS, others.check)
            others.have_joined = True
            yield world
            return
        _has_joined = _has_joined or launch is not None
        yield join(launch)


class _OtherRanks:
    """The processes that join this one, rank 0, over loopback. Where this one ends, so do they."""

    def __init__(self, count: int) -> None:
        """`count`: of all ranks, with this one."""
        self._addresses = [("127.0.0.1", port) for port in free_ports(count)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self.have_joined = False

    def __enter__(self) -> _OtherRanks:
        try:
            self._start()
        except BaseException:  # without it, nobody would end those that have started
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="runner-ranks-")
        hosts = Path(self._folder.name, "hosts.json")
        hosts.write_text(json.dumps([[f"{host}:{port}"] for host, port in self._addresses]))
        os.environ.update(MLX_RANK="0", MLX_HOSTFILE=str(hosts))
        for rank in range(1, len(self._addresses)):
            process = subprocess.Popen(
                [sys.executable, "-m", "runner.cli.rank"],
                stdin=subprocess.PIPE,  # nothing is written: its end tells the rank that this process has ended
                env={**os.environ, "MLX_RANK": str(rank)},
                start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which tells the others
            )
            self._processes.append(process)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in ("MLX_RANK", "MLX_HOSTFILE"):
            os.environ.pop(name, None)
        for process in self._processes:
            with suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            if not self.have_joined:
                process.kill()
        until = time.monotonic() + _END_SECONDS
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
        self._folder.cleanup()

    @property
    def launch(self) -> Launch:
        """Rank 0's place among them."""
        count = len(self._addresses)
        return Launch("ring", 0, count, self._addresses[0], local=count, own_addresses=(self._addresses[0],))

    def check(self) -> None:
        """Raise RankLost if one of them has ended."""
        for rank, process in enumerate(self._processes, start=1):
            if (code := process.poll()) is not None:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise RankLost(f"rank {rank} (pid {process.pid}) {how} before it joined the run.")
