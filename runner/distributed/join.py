"""How the ranks of a run find each other before MLX connects them.

`mx.distributed.init` waits without end, and without a sign, for a rank that never comes. So rank 0 waits for the others
first, at the address where MLX's own backend will wait afterwards, which needs no port of its own: it is free then.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from contextlib import closing, suppress

from runner import __version__
from runner.common.errors import RankLost
from runner.distributed.channel import SILENCE_SECONDS, Channel, Peer, connect
from runner.distributed.frames import Broken, FrameSocket, Kind, from_json, to_json

JOIN_SECONDS = 60.0
"""How long ranks wait for each other at the start; the slowest imports for some seconds."""


def open_channel(rank: int, size: int, address: tuple[str, int], *, seconds: float = JOIN_SECONDS) -> Channel:
    """Connect this rank with the others, which have to start within `seconds`.

    Raises:
        RankLost: a rank did not come, or is of another version.
    """
    until = time.monotonic() + seconds
    try:
        return Channel(rank, _accept_all(size, address, until) if rank == 0 else [_join(rank, size, address, until)])
    except Broken as error:
        raise RankLost(f"rank {rank} could not join the run at {_text(address)}: {error}.") from None


def listen(address: tuple[str, int]) -> socket.socket:
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


def _accept_all(size: int, address: tuple[str, int], until: float) -> list[Peer]:
    peers: dict[int, Peer] = {}
    with closing(listen(address)) as listener:
        while len(peers) < size - 1:
            listener.settimeout(max(0.01, until - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = [str(rank) for rank in range(1, size) if rank not in peers]
                ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(missing)}"
                raise RankLost(f"{ranks} of {size} did not come to {_text(address)} in time.") from None
            with suppress(Broken):  # a stranger, or a rank that has ended already
                peer = _greet(connection, size)
                peers[peer.rank] = peer
    for peer in peers.values():
        peer.socket.send(Kind.START, to_json(_self(0, size)))
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


def _join(rank: int, size: int, address: tuple[str, int], until: float) -> Peer:
    """Return rank 0, once it has said that all ranks are there."""
    while True:
        try:
            frames = FrameSocket(connect(address, until), max(SILENCE_SECONDS, until - time.monotonic()))
        except OSError as error:
            reason = f"{error.strerror or error}".lower()
            raise RankLost(f"rank 0 is not at {_text(address)} for rank {rank}: {reason}.") from None
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


def _self(rank: int, size: int) -> dict[str, object]:
    return {"rank": rank, "size": size, "host": platform.node(), "pid": os.getpid(), "version": __version__}


def _text(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"
