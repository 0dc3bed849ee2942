"""What ranks send each other on a socket: frames of a kind and bytes."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from typing import Any

from runner.common.errors import RunnerError

_HEADER = struct.Struct("!4sBQ")
_MAGIC = b"RNR1"
_MAX_TEXT = 1 << 20
MAX_DATA = 1 << 38
"""Bytes of the largest frame: the state of a run whose model is trained whole."""
_PIECE = 1 << 20


class Kind(IntEnum):
    """The kinds of frames."""

    HELLO = 1
    """Who a rank is (JSON)."""
    START = 2
    """All ranks are there."""
    BEAT = 3
    """The process is alive."""
    DATA = 4
    """A part of an exchange."""
    STOP = 5
    """The number of a stop signal that a rank received (JSON)."""
    END = 6
    """A rank ends, why and with which exit code (JSON)."""


class ConnectionLost(Exception):
    """Raised when the other side is gone or sends what is no frame."""


class FrameSocket:
    """A connected socket that sends and receives whole frames; each direction belongs to one thread at a time."""

    def __init__(self, connection: socket.socket, patience: float) -> None:
        """`patience`: seconds without a byte after which the other side counts as gone."""
        connection.settimeout(min(1.0, patience))
        with suppress(OSError):  # the other side may be gone already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self.patience = connection, patience
        self.heard = time.monotonic()
        """When the last bytes came."""

    def fileno(self) -> int:
        """Return the descriptor, for `select`."""
        return self._connection.fileno()

    def send(self, kind: Kind, content: bytes = b"") -> None:
        """Send a frame. Raises ConnectionLost where the other side does not take it."""
        view = memoryview(_HEADER.pack(_MAGIC, kind, len(content)) + content[:_PIECE])
        self._send(view)
        for start in range(_PIECE, len(content), _PIECE):
            self._send(memoryview(content)[start : start + _PIECE])

    def try_to_send(self, kind: Kind, content: bytes = b"") -> None:
        """Send a frame, unless the other side does not take it."""
        with suppress(ConnectionLost):
            self.send(kind, content)

    def receive(self) -> tuple[Kind, bytes]:
        """Wait for the next frame and return it. Raises ConnectionLost where none comes any more."""
        magic, number, size = _HEADER.unpack(self._receive(_HEADER.size))
        if magic != _MAGIC or number not in Kind.__members__.values():
            raise ConnectionLost("it is no rank of a run of this version")
        kind = Kind(number)
        if size > (MAX_DATA if kind is Kind.DATA else _MAX_TEXT):
            raise ConnectionLost("it sent more than it may")
        return kind, bytes(self._receive(size))

    def close(self) -> None:
        """Close the socket; a thread that waits in `receive` raises ConnectionLost."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _send(self, view: memoryview) -> None:
        since = time.monotonic()
        while view:
            try:
                sent = self._connection.send(view)
            except TimeoutError:
                if time.monotonic() - since > self.patience:
                    raise ConnectionLost(f"it did not answer for {self.patience:.0f} seconds") from None
                continue
            except OSError as error:
                raise ConnectionLost(_text(error)) from None
            view, since = view[sent:], time.monotonic()

    def _receive(self, size: int) -> bytearray:
        data = bytearray()
        while len(data) < size:
            try:
                piece = self._connection.recv(min(_PIECE, size - len(data)))
            except TimeoutError:
                if time.monotonic() - self.heard > self.patience:
                    raise ConnectionLost(f"it did not answer for {self.patience:.0f} seconds") from None
                continue
            except OSError as error:
                raise ConnectionLost(_text(error)) from None
            if not piece:
                raise ConnectionLost("its process ended")
            data += piece
            self.heard = time.monotonic()
        return data


def to_json(value: Any) -> bytes:
    """Return `value` as the content of a frame."""
    return json.dumps(value).encode()


def from_json(content: bytes) -> dict[str, Any]:
    """Return the object that a frame holds. Raises ConnectionLost where it holds none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConnectionLost("it sent what is no JSON object")
    return value


def pack(parts: Sequence[bytes]) -> bytes:
    """Return byte strings as one."""
    return b"".join([struct.pack("!I", len(parts)), *(struct.pack("!Q", len(part)) for part in parts), *parts])


def unpack(content: bytes) -> list[bytes]:
    """Return the byte strings that `pack` joined.

    Raises:
        RunnerError: the content is damaged.
    """
    try:
        (count,) = struct.unpack_from("!I", content)
        sizes = struct.unpack_from(f"!{count}Q", content, 4)
    except struct.error:
        raise RunnerError("A message of another rank is damaged.") from None
    start, parts = 4 + 8 * count, []
    for size in sizes:
        parts.append(content[start : start + size])
        start += size
    return parts


def _text(error: OSError) -> str:
    """Return what the system tells about a connection: a reset one is that of a process that was killed."""
    if isinstance(error, (ConnectionResetError, BrokenPipeError)):
        return "its process ended"
    return (error.strerror or type(error).__name__).lower()
