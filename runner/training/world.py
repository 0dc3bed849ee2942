"""The ranks of a run: their shares of a batch, what they add up and what they exchange.

A process alone is a world of one, whose operations return what they are given: the loop is the same for both.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from runner.common.errors import EXIT_RANK_LOST, RankLost, exit_code_of
from runner.distributed.channel import Channel
from runner.distributed.frames import pack, unpack
from runner.distributed.join import JOIN_SECONDS, listen, open_channel, own_addresses, port_problem
from runner.distributed.launch import Launch
from runner.training.signals import StopRequested, StopSignals

if TYPE_CHECKING:
    import mlx.core as mx

T = TypeVar("T")
_LIMB = 1 << 12
"""Counts are sent as numbers below this, whose float32 sum over up to 4,096 ranks is exact."""
_LIMBS = 3
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MAX_ADDRESSES = 8
_INIT_SECONDS = 60.0
"""How long MLX may take to connect ranks that are all there."""
_BLAME_SECONDS = 3.0
"""How long it may take to find out which rank is gone after MLX has reported that one is."""


@dataclass(frozen=True)
class UpdateSums:
    """What the ranks have added up for an update."""

    arrays: dict[str, mx.array]
    """Gradients, float32 vectors by key."""
    loss: float
    supervised: int
    tokens: int


class World:
    """A process alone: rank 0 of 1."""

    rank, size = 0, 1
    local = 1
    """Number of ranks on this machine."""
    backend: str | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def share(self, start: int = 0) -> slice:
        """Return which of some items belong to this rank: they are dealt in turn, the first of them as item `start`."""
        return slice((self.rank - start) % self.size, None, self.size)

    def sum_update(self, sums: UpdateSums) -> UpdateSums:
        """Return the sums over all ranks, and agree on a stop.

        Raises:
            RankLost: a rank is gone.
        """
        return sums

    def gather(self, content: bytes = b"", *, abandoned: bool = False) -> list[bytes]:
        """Return the `content` of each rank, and agree on a stop; all ranks have to call it, each at the same point.

        Args:
            abandoned: a stop signal ended this rank's work before it was complete.

        Raises:
            StopRequested: some rank's work is not complete.
            RankLost: a rank is gone, or failed.
        """
        if abandoned:
            raise StopRequested
        return [content]

    def broadcast(self, content: bytes | None) -> bytes:
        """Return the `content` of rank 0; what others give is not sent. Raises as `gather`."""
        return self.gather((content or b"") if self.is_first else b"")[0]

    def gather_arrays(self, *arrays: np.ndarray, abandoned: bool = False) -> list[list[np.ndarray]]:
        """Return for each of `arrays`, of one axis, those of all ranks by rank. Raises as `gather`."""
        if self.size == 1:
            self.gather(abandoned=abandoned)
            return [[array] for array in arrays]
        received = self.gather(pack([array.tobytes() for array in arrays]), abandoned=abandoned)
        by_rank = [unpack(content) for content in received]
        return [[np.frombuffer(parts[i], array.dtype) for parts in by_rank] for i, array in enumerate(arrays)]

    def on_abort(self, record: Callable[[BaseException], None]) -> None:
        """Have `record` called should this process end because another rank is gone and MLX waits for that."""

    @contextmanager
    def connected(self, stops: StopSignals) -> Iterator[None]:
        """Share `stops` with the other ranks, and tell them how this one's work ended."""
        yield


class Ranks(World):
    """Several processes, which have joined."""

    def __init__(self, launch: Launch, channel: Channel, group: mx.distributed.Group) -> None:
        self.rank, self.size, self.backend = launch.rank, launch.size, launch.backend
        self.local = launch.local
        self.channel = channel
        self._group: mx.distributed.Group | None = group
        self._stops = StopSignals()

    def sum_update(self, sums: UpdateSums) -> UpdateSums:
        """Add up one buffer over all ranks: gradients, loss, counts and stop signals in a single message."""
        import mlx.core as mx

        numbers = [sums.loss, *_limbs(sums.supervised), *_limbs(sums.tokens), *self._flags()]
        vectors = [array.reshape(-1).astype(mx.float32) for array in sums.arrays.values()]
        buffer = mx.concatenate([*vectors, mx.array(numbers, mx.float32)])
        mx.eval(buffer)
        self.barrier()
        try:
            added = mx.distributed.all_sum(buffer, group=self._group)
            mx.eval(added)
        except RuntimeError as error:
            self.channel.wait_for_loss(_BLAME_SECONDS)
            raise RankLost(f"the connection to another rank is lost: {error}") from None
        arrays, start = {}, 0
        for key, array in sums.arrays.items():
            arrays[key] = added[start : start + array.size].reshape(array.shape).astype(array.dtype)
            start += array.size
        loss, *rest = np.array(added[start:]).tolist()
        self._agree(rest[2 * _LIMBS :])
        return UpdateSums(arrays, loss, _count(rest[:_LIMBS]), _count(rest[_LIMBS : 2 * _LIMBS]))

    def barrier(self) -> None:
        """Wait for all ranks, asleep: MLX's ring would spin on two cores, those that a slower rank may need."""
        self.channel.gather(b"")

    def gather(self, content: bytes = b"", *, abandoned: bool = False) -> list[bytes]:
        """Exchange `content` on the channel, with the stop signals."""
        flags = np.array([*self._flags(), abandoned], np.uint8).tobytes()
        received = [unpack(each) for each in self.channel.gather(pack([flags, content]))]
        flags_by_rank = np.array([list(flags) for flags, _ in received])
        self._agree(flags_by_rank[:, :-1].sum(axis=0).tolist())
        if flags_by_rank[:, -1].any():
            raise StopRequested
        return [content for _, content in received]

    def on_abort(self, record: Callable[[BaseException], None]) -> None:
        """As `World.on_abort`."""
        self.channel.on_abort = record

    @contextmanager
    def connected(self, stops: StopSignals) -> Iterator[None]:
        """As `World.connected`; rank 0's end is that of all, and the others wait for it."""
        self._stops = stops
        stops.share(self.channel.broadcast_stop)
        self.channel.on_stop = stops.request
        try:
            yield
        except BaseException as error:
            is_exit = isinstance(error, SystemExit)
            self.channel.end(exit_code_of(error), None if is_exit else str(error) or type(error).__name__)
            raise
        finally:
            self._group = None  # MPI is to be finalized before the process ends
        if self.is_first:
            self.channel.end(0)

    def _flags(self) -> list[int]:
        return [int(self._stops.requested == number) for number in _SIGNALS]

    def _agree(self, flags: Sequence[float]) -> None:
        """Take the first stop signal that any rank has received as that of all."""
        for number, flag in zip(_SIGNALS, flags, strict=True):
            if flag:
                self._stops.agree(number)
                return


ALONE = World()
"""The world of a process that was not launched as one of several ranks."""


def join(launch: Launch | None, seconds: float = JOIN_SECONDS, check: Callable[[], None] = lambda: None) -> World:
    """Return the world of this process, once all ranks are connected. MLX is imported here.

    Args:
        launch: None where it is alone.
        seconds: how long to wait for the others.
        check: called while it waits; raises what makes that pointless.

    Raises:
        RankLost: a rank did not come, is gone, or cannot take part.
        SystemExit: rank 0 has ended, with its exit code, and says why.
    """
    if launch is None:
        return ALONE
    import mlx.core as mx

    problem = port_problem(launch.own_addresses)
    if not mx.distributed.is_available(launch.backend):
        problem = f"its MLX has no {launch.backend} backend of mx.distributed: choose another --backend."
    if launch.address is None and problem:
        raise RankLost(f"rank {launch.rank}: {problem}")
    channel = None
    if launch.address is not None:
        channel = open_channel(launch.rank, launch.size, launch.address, seconds=seconds, problem=problem, check=check)
    try:
        with _ended_after(_INIT_SECONDS):
            group = mx.distributed.init(strict=True, backend=launch.backend)
    except RuntimeError as error:
        reason = f"rank {launch.rank} could not connect to its neighbours: {error}"
        if channel is not None:
            channel.wait_for_loss(_BLAME_SECONDS)
            channel.end(EXIT_RANK_LOST, reason)
        raise RankLost(reason) from None
    return Ranks(launch, channel or _channel_by(group, launch), group)


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer: `mx.distributed.init` waits without end for a rank that died just
    now, and holds Python's lock meanwhile, so that no thread of Python could."""
    try:
        stream = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
    except (OSError, ValueError):
        stream = 2
    faulthandler.dump_traceback_later(seconds, exit=True, file=stream)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _channel_by(group: mx.distributed.Group, launch: Launch) -> Channel:
    """Open the channel at an address that rank 0 chooses and tells the others through `group`."""
    import mlx.core as mx

    with listen(("", 0)) if launch.rank == 0 else nullcontext() as listener:
        told = np.zeros(1 + 4 * _MAX_ADDRESSES, np.int32)
        if listener is not None:
            *outside, loopback = own_addresses()
            own = [*outside[: _MAX_ADDRESSES - 1], loopback]
            told[0] = listener.getsockname()[1]
            told[1 : 1 + 4 * len(own)] = [int(part) for address in own for part in address.split(".")]
        port, *parts = np.array(mx.distributed.all_sum(mx.array(told), group=group, stream=mx.cpu)).tolist()
        found = [".".join(map(str, parts[i : i + 4])) for i in range(0, len(parts), 4)]
        addresses = [(address, port) for address in found if address != "0.0.0.0"]
        return open_channel(launch.rank, launch.size, *addresses, listener=listener)


def _limbs(count: int) -> list[int]:
    return [count >> (12 * i) & (_LIMB - 1) for i in range(_LIMBS)]


def _count(limbs: Sequence[float]) -> int:
    return sum(round(limb) << (12 * i) for i, limb in enumerate(limbs))
