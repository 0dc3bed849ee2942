"""`ranks=N`: a run starts its other ranks itself, on this machine, so that a job of a sweep can have several."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from runner.common.errors import ConfigError
from runner.config.invocation import Invocation
from runner.distributed.launch import Launch
from runner.training.world import World, join

_END_SECONDS = 10.0
"""How long the other ranks may take to end after this one."""
_joined: list[int] = []
"""The numbers of ranks that this process has joined: MLX connects a process once, for good."""


@contextmanager
def joined_world(invocation: Invocation) -> Iterator[World]:
    """Join the ranks that `invocation` was launched with or asks for, and yield the world of this process, rank 0.

    Raises:
        ConfigError: it asks for ranks although it is one of several, or this process had some before.
        RankLost: a rank did not come.
    """
    with ExitStack() as stack:
        launch = invocation.launch
        if invocation.ranks is not None and invocation.ranks > 1:
            if launch is not None:
                raise ConfigError(
                    f"ranks={invocation.ranks} starts ranks, and this is one of {launch.size}: leave it out."
                )
            if _joined:
                raise ConfigError("ranks= needs a process for each run: MLX connects a process with others only once.")
            launch = stack.enter_context(_local_ranks(invocation.ranks))
        if launch is not None:
            _joined.append(launch.size)
        yield join(launch)


@contextmanager
def _local_ranks(count: int) -> Iterator[Launch]:
    """Start `count` - 1 processes that join this one over loopback, and yield how this one does."""
    with tempfile.TemporaryDirectory(prefix="runner-ranks-") as folder:
        addresses = [("127.0.0.1", port) for port in free_ports(count)]
        hosts = Path(folder, "hosts.json")
        hosts.write_text(json.dumps([[f"{host}:{port}"] for host, port in addresses]))
        os.environ.update(MLX_RANK="0", MLX_HOSTFILE=str(hosts))
        others = [
            subprocess.Popen(
                [sys.executable, "-m", "runner.cli.rank"],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "MLX_RANK": str(rank)},
            )
            for rank in range(1, count)
        ]
        try:
            yield Launch("ring", 0, count, addresses[0], local=count)
        finally:
            for name in ("MLX_RANK", "MLX_HOSTFILE"):
                os.environ.pop(name, None)
            for other in others:
                with suppress(subprocess.TimeoutExpired):
                    other.wait(_END_SECONDS)
                if other.poll() is None:
                    other.kill()
                    other.wait()


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody uses now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
