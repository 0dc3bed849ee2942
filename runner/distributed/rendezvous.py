"""Rank 0 waits for the others: it keeps those that have come alive, and ends all where one of them is gone."""

from __future__ import annotations

import selectors
import socket
import sys
import time
from collections.abc import Callable

from runner.common.errors import EXIT_CONFIG, EXIT_RANK_LOST, RankLost, exit_code_of
from runner.distributed.channel import BEAT_SECONDS, SILENCE_SECONDS, Peer
from runner.distributed.frames import ConnectionLost, FrameSocket, Kind, from_json, to_json
from runner.distributed.identity import RankIdentity

_TICK = 0.25
_HELLO_SECONDS = 2.0
"""Longest pause between two bytes of who has connected, in which it says who it is."""
_MISSING_NOTICE_SECONDS = 10.0
"""How long ranks may be missing without a line that says so."""
_MAX_PENDING = 64


class Rendezvous:
    """Takes up the ranks of a run at a socket that listens. One thread does all, so that nothing is left behind."""

    def __init__(self, own: RankIdentity, listener: socket.socket, address: str, check: Callable[[], None]) -> None:
        """Wait at `listener`.

        Args:
            own: of rank 0.
            listener: a socket of rank 0.
            address: its address, for messages.
            check: raises what makes waiting pointless, such as the end of a process that was to join.
        """
        self._own, self._listener, self._address, self._check = own, listener, address, check
        self._peers: dict[int, Peer] = {}
        self._pending: list[FrameSocket] = []
        """Who has connected and not said yet who it is, the oldest first."""
        self._refused: list[str] = []
        self._beaten = 0.0

    def receive_all(self, until: float) -> list[Peer]:
        """Return all other ranks once they are there; they wait for `Kind.START` then.

        Args:
            until: by `time.monotonic`.

        Raises:
            RankLost: a rank did not come in time, or is gone, or cannot take part. Those that are there were told so.
        """
        try:
            self._wait(until)
        except BaseException as error:
            told = to_json({"code": exit_code_of(error), "reason": str(error) or type(error).__name__})
            for peer in self._peers.values():
                peer.socket.try_to_send(Kind.END, told)
                peer.socket.close()
            raise
        finally:
            for connection in self._pending:
                connection.close()
        return list(self._peers.values())

    def _wait(self, until: float) -> None:
        notice_at = time.monotonic() + _MISSING_NOTICE_SECONDS
        self._listener.setblocking(False)
        with selectors.DefaultSelector() as ready:
            ready.register(self._listener, selectors.EVENT_READ)
            while len(self._peers) < self._own.size - 1:
                self._read(ready)
                self._check()
                now = time.monotonic()
                if now - self._beaten >= BEAT_SECONDS:
                    self._beaten = now
                    for peer in self._peers.values():
                        self._send(peer, Kind.BEAT)
                if now >= notice_at:
                    notice_at = float("inf")
                    print(f"runner: waiting for {self._missing()} at {self._address}", file=sys.stderr, flush=True)
                if now >= until:
                    missing, refused = self._missing(), "".join(f" {reason}" for reason in self._refused)
                    raise RankLost(f"{missing} of {self._own.size} did not come to {self._address} in time.{refused}")

    def _read(self, ready: selectors.BaseSelector) -> None:
        """Wait for a moment, and read what ranks that are there, and connections that are pending, have sent."""
        arrived = [key.fileobj for key, _ in ready.select(_TICK)]
        for peer in self._peers.values():
            self._poll(peer, peer.socket in arrived)
        # One at a time, since each may keep this thread waiting, and those that are there need to hear of it meanwhile.
        connection = next((connection for connection in self._pending if connection in arrived), None)
        if connection is not None:
            self._pending.remove(connection)
            if not self._handshake(connection):
                ready.unregister(connection)
                connection.close()
        if self._listener in arrived and (new := self._accept()):
            ready.register(new, selectors.EVENT_READ)
        if len(self._pending) > _MAX_PENDING:
            ready.unregister(self._pending[0])
            self._pending.pop(0).close()

    def _missing(self) -> str:
        missing = [str(rank) for rank in range(1, self._own.size) if rank not in self._peers]
        return f"rank{'s' * (len(missing) > 1)} {', '.join(missing)}"

    def _accept(self) -> FrameSocket | None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again
            return None
        connection.setblocking(True)
        self._pending.append(FrameSocket(connection, _HELLO_SECONDS))
        return self._pending[-1]

    def _handshake(self, connection: FrameSocket) -> bool:
        """Take up who has said that it is a rank of this run, and return whether it is one.

        Raises:
            RankLost: it is a rank that cannot take part in the run.
        """
        try:
            kind, content = connection.receive()
            if kind is not Kind.HELLO:
                return False
            found = RankIdentity.of(from_json(content))
        except ConnectionLost:
            return False
        problem = found.problem or self._own.difference(found)
        if found.rank in self._peers and not problem:
            self._refused.append(
                f"{found.name} came too, and {self._peers[found.rank].name} was there: does another run use this port "
                "(mlx.launch --starting-port)?"
            )
            connection.try_to_send(Kind.END, to_json({"code": EXIT_CONFIG, "reason": self._refused[-1]}))
            return False
        if problem:
            refusal = RankLost(f"{found.name}: {problem}", EXIT_RANK_LOST if found.problem else EXIT_CONFIG)
            connection.try_to_send(Kind.END, to_json({"code": refusal.exit_code, "reason": str(refusal)}))
            raise refusal
        connection.patience = SILENCE_SECONDS
        self._peers[found.rank] = peer = Peer(found, connection)
        self._send(peer, Kind.BEAT)
        return True

    def _poll(self, peer: Peer, has_sent: bool) -> None:
        """Read what a rank that waits has sent, which is nothing but that it is alive."""
        try:
            if has_sent:
                peer.socket.receive()
            elif time.monotonic() - peer.socket.heard > SILENCE_SECONDS:
                raise ConnectionLost(f"it did not answer for {SILENCE_SECONDS:.0f} seconds")
        except ConnectionLost as error:
            raise RankLost(f"{peer.name} is lost before the run began: {error}.") from None

    def _send(self, peer: Peer, kind: Kind) -> None:
        try:
            peer.socket.send(kind, to_json(self._own.as_json()))
        except ConnectionLost as error:
            raise RankLost(f"{peer.name} is lost before the run began: {error}.") from None
