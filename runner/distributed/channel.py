"""A channel beside MLX's own: each rank has a TCP connection to rank 0, which passes messages on to all.

Gradients go through `mx.distributed`. But its operations wait without end for a rank that hangs or is cut off, cannot
tell which one, and spin meanwhile. So everything else goes through this channel: what ranks agree on, what they
exchange outside of updates, stop signals, and heartbeats by which every rank learns within seconds that one is gone.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from runner.common.errors import RankLost
from runner.common.text import shorten
from runner.distributed.frames import ConnectionLost, FrameSocket, Kind, from_json, pack, to_json, unpack
from runner.distributed.identity import RankIdentity

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 6.0
"""After so long without a heartbeat a rank counts as gone."""
GRACE_SECONDS = 2.0
"""How long the training thread may take to notice a loss before the process ends: it may wait inside of MLX."""
_TICK = 0.2


@dataclass
class Peer:
    """Another rank that this one is connected to: all others for rank 0, rank 0 for the others."""

    identity: RankIdentity
    socket: FrameSocket
    inbox: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    sending: threading.Lock = field(default_factory=threading.Lock)
    is_done: bool = False
    """Whether it said that it ends."""
    is_lost: bool = False
    stop_sent: bool = False
    """Whether it was told of this rank's stop signal."""

    @property
    def rank(self) -> int:
        """Its number."""
        return self.identity.rank

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.identity.name


class Channel:
    """The connections of one rank, kept alive by a thread for each and one for the heartbeats."""

    def __init__(self, rank: int, peers: list[Peer]) -> None:
        self.rank, self.peers = rank, sorted(peers, key=lambda peer: peer.rank)
        self.on_abort: Callable[[BaseException], None] = lambda error: None
        """Called before the process ends because the training thread did not notice a loss."""
        self.on_stop: Callable[[signal.Signals], None] = lambda number: None
        """Called on another thread where a rank received a stop signal."""
        self._end: BaseException | None = None
        self._ended_at = 0.0
        self._is_raised = False
        self._closed = threading.Event()
        self._guard = threading.Lock()
        self._stop: signal.Signals | None = None
        self._threads = [threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in self.peers]
        self._threads.append(threading.Thread(target=self._keep_alive, daemon=True))
        for thread in self._threads:
            thread.start()

    def gather(self, content: bytes) -> list[bytes]:
        """Return the `content` of every rank, by rank; all of them have to call it.

        Raises:
            RankLost: a rank is gone or failed.
            SystemExit: rank 0 has ended, with its exit code.
        """
        self.check()
        if self.rank == 0:
            packed = pack([content, *(self._take(peer) for peer in self.peers)])
            for peer in self.peers:
                self._send(peer, Kind.DATA, packed)
            self.check()
        else:
            self._send(self.peers[0], Kind.DATA, content)
            packed = self._take(self.peers[0])
        return unpack(packed)

    def check(self) -> None:
        """Raise what ended the run on another rank, if anything did."""
        if self._end is not None:
            self._is_raised = True
            raise self._end

    def wait_for_loss(self, seconds: float) -> None:
        """Wait until it is known which rank is gone, and raise that; return where none is after `seconds`."""
        until = time.monotonic() + seconds
        while self._end is None and time.monotonic() < until:
            time.sleep(0.02)
        self.check()

    def broadcast_stop(self, number: signal.Signals) -> None:
        """Tell the ranks that this one is connected with, once, that it received a stop signal; rank 0 passes it on."""
        self._stop = self._stop or number

    def end(self, code: int, reason: str | None = None) -> None:
        """Tell the other ranks that this one ends with the exit `code`, for a `reason` if it failed, and close."""
        for peer in self.peers:
            self._send(peer, Kind.END, to_json({"code": code, "reason": reason}))
        self.close()

    def wait_for_end(self) -> int:
        """Wait until rank 0 ends, and return its exit code.

        Raises:
            RankLost: it is gone.
        """
        while True:
            try:
                self._take(self.peers[0])
            except SystemExit as exit_:
                return int(exit_.code or 0)

    @property
    def reports_errors(self) -> bool:
        """Whether this rank has to print what ended the run: rank 0, or all others where that is gone."""
        return self.rank == 0 or not self.peers[0].is_done

    def close(self) -> None:
        """Close the connections."""
        self._closed.set()
        for peer in self.peers:
            peer.socket.close()

    def _take(self, peer: Peer) -> bytes:
        """Return the next message of a rank; signals of this process are handled meanwhile."""
        while True:
            with suppress(queue.Empty):
                content = peer.inbox.get(timeout=1.0)
                if content is not None:
                    return content
            self.check()

    def _send(self, peer: Peer, kind: Kind, content: bytes = b"", *, seconds: float = -1) -> bool:
        """Send a frame and return whether it was sent: another thread may be sending for longer than `seconds`."""
        if not peer.sending.acquire(timeout=seconds):
            return False
        try:
            peer.socket.send(kind, content)
            return True
        except ConnectionLost as error:
            self._lose(peer, str(error))
            return False
        finally:
            peer.sending.release()

    def _listen(self, peer: Peer) -> None:
        """Receive the frames of a rank until it ends."""
        try:
            while not self._closed.is_set():
                kind, content = peer.socket.receive()
                if kind is Kind.DATA:
                    peer.inbox.put(content)
                elif kind is Kind.STOP:
                    self.on_stop(signal.Signals(int(from_json(content)["signal"])))
                elif kind is Kind.END:
                    self._hear_end(peer, from_json(content))
        except (ConnectionLost, KeyError, TypeError, ValueError) as error:
            self._lose(peer, str(error) if isinstance(error, ConnectionLost) else "it sent what is no message")

    def _hear_end(self, peer: Peer, message: dict[str, object]) -> None:
        peer.is_done = True
        reason, code = message.get("reason"), message.get("code")
        code = code if isinstance(code, int) and 0 <= code < 256 else 1
        if self.rank != 0 and reason is None:
            self._set_end(SystemExit(code))
        elif self.rank != 0:
            self._set_end(RankLost(shorten(reason, 2000), code))
        else:  # only rank 0 ends by itself
            text = shorten(reason, 2000) if reason else f"it ended with exit code {code}"
            self._set_end(RankLost(f"{peer.name}: {text}", code or 1))

    def _lose(self, peer: Peer, reason: str) -> None:
        if not peer.is_done and not self._closed.is_set():
            peer.is_lost = True
            self._set_end(RankLost(f"{peer.name} is lost: {reason}. What was saved before is intact."))

    def _set_end(self, end: BaseException) -> None:
        with self._guard:
            if self._end is not None or self._closed.is_set():
                return
            self._ended_at = time.monotonic()
            self._end = end
        if self.rank == 0 and isinstance(end, RankLost):
            told = to_json({"code": end.exit_code, "reason": str(end)})
            for peer in self.peers:
                if not peer.is_done and not peer.is_lost:
                    self._send(peer, Kind.END, told, seconds=1.0)
        for peer in self.peers:
            peer.inbox.put(None)  # wakes the training thread

    def _keep_alive(self) -> None:
        beaten = 0.0
        while not self._closed.wait(_TICK):
            now = time.monotonic()
            if now - beaten >= BEAT_SECONDS:
                beaten = now
                for peer in self.peers:
                    self._send(peer, Kind.BEAT, seconds=0)
            if self._stop is not None:
                for peer in self.peers:
                    told = {"signal": int(self._stop)}
                    peer.stop_sent = peer.stop_sent or self._send(peer, Kind.STOP, to_json(told), seconds=0)
            if self._end is not None and not self._is_raised and now - self._ended_at > GRACE_SECONDS:
                self._abort(self._end)

    def _abort(self, end: BaseException) -> None:
        """End this process: its training thread waits inside of MLX for a rank that is gone."""
        with suppress(Exception):
            self.on_abort(end)
        if isinstance(end, RankLost):
            with suppress(OSError, ValueError):
                if self.reports_errors:
                    print(f"runner: {end}", file=sys.stderr, flush=True)
            os._exit(end.exit_code)
        os._exit(end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 1)
