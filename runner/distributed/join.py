"""How the ranks of a run find each other before MLX connects them.

`mx.distributed.init` waits without end, and without a sign, for a rank that never comes. So rank 0 waits for the others
first, at the address where MLX's own backend will wait afterwards, which needs no port of its own: it is free then.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import cycle

from runner.common.errors import RankLost
from runner.common.text import shorten
from runner.distributed.channel import SILENCE_SECONDS, Channel, Peer
from runner.distributed.frames import ConnectionLost, FrameSocket, Kind, from_json, to_json
from runner.distributed.identity import RankIdentity
from runner.distributed.rendezvous import Rendezvous

Address = tuple[str, int]
"""An IPv4 address or a host's name, and a port."""
JOIN_SECONDS = 60.0
"""How long ranks wait for each other at the start; the slowest imports for some seconds."""


def open_channel(
    rank: int,
    size: int,
    *addresses: Address,
    seconds: float = JOIN_SECONDS,
    listener: socket.socket | None = None,
    problem: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> Channel:
    """Connect this rank with the others, which have to start within `seconds`.

    A rank that is gone after it has come ends all at once. One that has not come may be slow to start: it has all of
    that time, unless `check` knows better.

    Args:
        rank: this rank.
        size: number of ranks.
        addresses: where rank 0 waits, as others may reach it; of the first of them where it has no `listener`.
        seconds: how long to wait.
        listener: of rank 0, where it waits already.
        problem: why this rank cannot take part, which ends all.
        check: called while this rank waits; raises what makes that pointless.

    Raises:
        RankLost: a rank did not come, is gone, or cannot take part.
        SystemExit: rank 0 has ended, with its exit code, and says why.
    """
    until = time.monotonic() + seconds
    own = RankIdentity.own(rank, size, problem)
    if rank > 0:
        return Channel(rank, [_join(own, addresses, until, check)])
    if problem is not None:
        raise RankLost(f"rank 0: {problem}")
    with closing(listener or listen(addresses[0])) as waiting:
        peers = Rendezvous(own, waiting, _text(addresses[0]), check).receive_all(until)
    for peer in peers:  # only now, when nobody waits at the address: MLX of a rank that is quick would be answered here
        peer.socket.try_to_send(Kind.START)
    return Channel(rank, peers)


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
    """Return a socket that waits at `address`, where nobody else does; once it is closed, another one may at once.

    Raises:
        RankLost: the address is not of this machine, or its port is taken.
    """
    try:
        return _listener(address)
    except OSError as error:
        raise RankLost(f"rank 0: {_why_not(address, error)}") from None


def port_problem(addresses: Sequence[Address]) -> str | None:
    """Return why MLX could not wait for a neighbour at each of a rank's own `addresses`; None where it can."""
    for address in addresses:
        try:
            _listener(address).close()
        except OSError as error:
            return _why_not(address, error)
    return None


def _listener(address: Address) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Not SO_REUSEPORT, with which two runs would wait at one port and share those that come. MLX sets both.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _why_not(address: Address, error: OSError) -> str:
    taken = error.errno == errno.EADDRINUSE
    advice = "take other ports: mlx.launch --starting-port" if taken else "its address has to be one of its machine"
    return f"it cannot wait at {_text(address)}: {(error.strerror or str(error)).lower()}; {advice}."


def _join(own: RankIdentity, addresses: Sequence[Address], until: float, check: Callable[[], None]) -> Peer:
    """Return rank 0, once it has said that all ranks are there."""
    for address in cycle(addresses):
        check()
        try:
            connection = socket.create_connection(address, timeout=max(0.1, min(5.0, until - time.monotonic())))
        except OSError as error:
            reason = f"{error.strerror or error}".lower()
            if time.monotonic() < until:
                time.sleep(0.1)
                continue
            raise RankLost(f"rank 0 is not at {_text(address)} for rank {own.rank}: {reason}.") from None
        frames = FrameSocket(connection, SILENCE_SECONDS)
        try:
            frames.send(Kind.HELLO, to_json(own.as_json()))
            return Peer(_wait_for_start(frames, check), frames)
        except ConnectionLost as error:  # of an earlier start that is just ending, or another program
            if time.monotonic() > until:
                raise RankLost(f"rank {own.rank} could not join the run at {_text(address)}: {error}.") from None
        except BaseException:
            frames.close()
            raise
        frames.close()
        time.sleep(0.1)
    raise AssertionError("the addresses are tried again and again")


def _wait_for_start(frames: FrameSocket, check: Callable[[], None]) -> RankIdentity:
    """Answer the heartbeats of rank 0 until it says that all ranks are there; return who it is.

    Raises:
        ConnectionLost: it was not rank 0.
        RankLost: it was, and is gone, or refuses this rank.
        SystemExit: it has ended, with its exit code.
    """
    first: RankIdentity | None = None
    while True:
        try:
            kind, content = frames.receive()
            if kind is Kind.BEAT:
                first = RankIdentity.of(from_json(content))
                frames.send(Kind.BEAT)
            elif kind is Kind.START and first is not None:
                return first
            elif kind is Kind.END:
                told = from_json(content)
                code = told.get("code")
                code = code if isinstance(code, int) and 0 < code < 256 else 1
                if first is not None:
                    raise SystemExit(code)
                raise RankLost(shorten(told.get("reason"), 1000), code)
            else:
                raise ConnectionLost("it is no rank 0")
        except ConnectionLost as error:
            if first is None:
                raise
            raise RankLost(f"{first.name} is lost before the run began: {error}.") from None
        check()


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
