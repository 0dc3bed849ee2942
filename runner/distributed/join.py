"""How the ranks of a run find each other before MLX connects them.

`mx.distributed.init` waits without end, and without a sign, for a rank that never comes. So rank 0 waits for the others
first, at the address where MLX's own backend will wait afterwards, which needs no port of its own: it is free then.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from itertools import cycle

from runner import __version__
from runner.common.errors import RankLost
from runner.distributed.channel import SILENCE_SECONDS, Channel, Peer
from runner.distributed.frames import Broken, FrameSocket, Kind, from_json, to_json

Address = tuple[str, int]
"""An IPv4 address or a host's name, and a port."""
JOIN_SECONDS = 60.0
"""How long ranks wait for each other at the start; the slowest imports for some seconds."""
_NOTICE_SECONDS = 10.0
"""How long that may take without a line that says so."""


def open_channel(
    rank: int,
    size: int,
    *addresses: Address,
    seconds: float = JOIN_SECONDS,
    listener: socket.socket | None = None,
) -> Channel:
    """Connect this rank with the others, which have to start within `seconds`.

    Args:
        rank: this rank.
        size: number of ranks.
        addresses: where rank 0 waits, as others may reach it; of the first of them where it has no `listener`.
        seconds: how long to wait.
        listener: of rank 0, where it waits already.

    Raises:
        RankLost: a rank did not come, or is of another version.
    """
    until = time.monotonic() + seconds
    try:
        if rank > 0:
            return Channel(rank, [_join(rank, size, addresses, until)])
        with closing(listener or listen(addresses[0])) as waiting:
            peers = _accept_all(size, waiting, _text(addresses[0]), until)
        # Only now, when nobody waits at the address any more: MLX of a rank that is quick would be answered here.
        for peer in peers:
            peer.socket.send(Kind.START, to_json(_self(0, size)))
        return Channel(rank, peers)
    except Broken as error:
        raise RankLost(f"rank {rank} could not join the run at {_text(addresses[0])}: {error}.") from None


def own_addresses() -> list[str]:
    """Return the IPv4 addresses of this machine that others may reach it at, the likeliest first; loopback is last."""
    found: list[str] = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # sends nothing: it asks for the route
        found.append(probe.getsockname()[0])
    with suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    outside = [address for address in dict.fromkeys(found) if not address.startswith("127.")]
    return [*outside, "127.0.0.1"]


def listen(address: Address) -> socket.socket:
    """Return a socket that waits at `address`; another one may do so once it is closed, at once.

    Raises:
        RankLost: the address is not of this machine, or its port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        for option in ("SO_REUSEADDR", "SO_REUSEPORT"):
            listener.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise RankLost(
            f"rank 0 cannot wait for the others at {_text(address)}: {error.strerror}. Its address in the hostfile has "
            "to be one of this machine, with free ports (mlx.launch --starting-port)."
        ) from None
    return listener


def _accept_all(size: int, listener: socket.socket, address: str, until: float) -> list[Peer]:
    peers: dict[int, Peer] = {}
    notice_at = time.monotonic() + _NOTICE_SECONDS
    while len(peers) < size - 1:
        now = time.monotonic()
        listener.settimeout(max(0.01, min(until, notice_at) - now))
        missing = [str(rank) for rank in range(1, size) if rank not in peers]
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(missing)}"
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if now >= until:
                raise RankLost(f"{ranks} of {size} did not come to {address} in time.") from None
            if now >= notice_at:
                print(f"runner: waiting for {ranks} at {address}", file=sys.stderr, flush=True)
                notice_at = float("inf")
            continue
        with suppress(Broken):  # a stranger, or a rank that has ended already
            peer = _greet(connection, size)
            peers[peer.rank] = peer
    return list(peers.values())


def _greet(connection: socket.socket, size: int) -> Peer:
    """Return the rank that has connected. Raises Broken where it is none of this run."""
    frames = FrameSocket(connection, SILENCE_SECONDS)
    try:
        kind, content = frames.receive()
        if kind is not Kind.HELLO:
            raise Broken("it did not say who it is")
        said = from_json(content)
        problem = None
        if said.get("version") != __version__:
            problem = f"it has version {said.get('version')} of runner, rank 0 has {__version__}"
        elif said.get("size") != size or said.get("rank") not in range(1, size):
            problem = f"it is rank {said.get('rank')} of {said.get('size')}, and there are {size}"
        if problem:
            frames.send(Kind.END, to_json({"code": 1, "reason": problem}))
            raise Broken(problem)
        return Peer(int(said["rank"]), str(said.get("host"))[:200], int(said.get("pid", 0)), frames)
    except (TypeError, ValueError) as error:
        raise Broken(str(error)) from None


def _join(rank: int, size: int, addresses: Sequence[Address], until: float) -> Peer:
    """Return rank 0, once it has said that all ranks are there."""
    for address in cycle(addresses):
        try:
            connection = socket.create_connection(address, timeout=max(0.1, min(5.0, until - time.monotonic())))
        except OSError as error:
            reason = f"{error.strerror or error}".lower()
            if time.monotonic() < until:
                time.sleep(0.1)
                continue
            raise RankLost(f"rank 0 is not at {_text(address)} for rank {rank}: {reason}.") from None
        frames = FrameSocket(connection, max(SILENCE_SECONDS, until - time.monotonic()))
        try:
            frames.send(Kind.HELLO, to_json(_self(rank, size)))
            kind, content = frames.receive()
        except Broken:  # of an earlier start that is just ending
            frames.close()
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
            continue
        said = from_json(content)
        if kind is not Kind.START:
            raise Broken(str(said.get("reason"))[:500])
        return Peer(0, str(said.get("host"))[:200], int(said.get("pid", 0)), frames.with_patience(SILENCE_SECONDS))
    raise AssertionError("the addresses are tried again and again")


def _self(rank: int, size: int) -> dict[str, object]:
    return {"rank": rank, "size": size, "host": platform.node(), "pid": os.getpid(), "version": __version__}


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
