"""Encoding the chunks of a file, in this process or in worker processes; the results come in file order."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

from runner.common.cores import usable_cores
from runner.common.errors import DataError, RunnerError
from runner.data.encode import Chunk, EncodedChunk, EncodeTask, encode_chunk
from runner.data.row_errors import RowErrors
from runner.data.text_encoder import TextEncoder

PARALLEL_MIN_BYTES = 8 << 20
"""Smallest file that is encoded in parallel. A worker takes two to three seconds to start, and one process encodes 0.3
MB (conversations of 200 characters) to 1.4 MB (of 2,000) a second: 8 MB take it 6 to 25 s."""
MAX_WORKERS = 8
"""Each takes about 100 MB for the libraries and as much again as the tokenizer does."""
_POLL_SECONDS = 0.2
_MAX_PENDING = 4
"""Results per worker that may wait for an earlier one."""
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

EncodedChunks = Generator[EncodedChunk, None, None]
Result = tuple[EncodedChunk, RowErrors] | DataError


def worker_count(size: int) -> int:
    """Return how many worker processes to use for a file of `size` bytes; 0 means to encode it in this process."""
    cores = usable_cores()
    # A daemonic process (started by a launcher of sweeps, for example) cannot have children.
    serial = size < PARALLEL_MIN_BYTES or cores < 2 or multiprocessing.current_process().daemon
    return 0 if serial else min(cores, MAX_WORKERS)


def encode_serially(
    task: EncodeTask, chunks: Iterator[Chunk], errors: RowErrors, check_stop: Callable[[], None]
) -> EncodedChunks:
    """Yield the encoded `chunks`; `check_stop` is called before each and may raise.

    Raises:
        DataError: as `encode_chunk`.
    """
    encoder = TextEncoder(task.tokenizer, task.template)
    for chunk in chunks:
        check_stop()
        yield encode_chunk(chunk, task, encoder, errors)


def encode_in_parallel(
    task: EncodeTask, chunks: Iterator[Chunk], errors: RowErrors, check_stop: Callable[[], None], count: int
) -> EncodedChunks:
    """Yield the encoded `chunks` of `count` worker processes in order; `check_stop` is called often and may raise.

    Falls back to this process where workers cannot be started or the tokenizer cannot be pickled. Stops the workers
    however the generator ends; they exit by themselves if this process is killed.

    Raises:
        DataError: as `encode_chunk`, for the first chunk of the file that fails.
        RunnerError: a worker died.
    """
    workers: list[_Worker] = []
    try:
        with suppress(Exception):  # pickling runs code of the tokenizer, and the system may refuse a process
            pickled_task = bytes(ForkingPickler.dumps(task))
            for _ in range(count):
                workers.append(_Worker())
            for worker in workers:
                worker.send_task(pickled_task)
        if len(workers) == count and all([worker.wait_until_ready(check_stop) for worker in workers]):
            yield from _encode_in_order(workers, chunks, errors, check_stop)
        else:
            yield from encode_serially(task, chunks, errors, check_stop)
    finally:
        for worker in workers:
            worker.stop()


def _encode_in_order(
    workers: list[_Worker], chunks: Iterator[Chunk], errors: RowErrors, check_stop: Callable[[], None]
) -> Iterator[EncodedChunk]:
    results: dict[int, Result] = {}
    busy: dict[Connection, tuple[int, _Worker]] = {}
    idle = list(workers)
    sent = yielded = 0
    exhausted = False
    while True:
        while not exhausted and idle and sent < yielded + _MAX_PENDING * len(workers):
            chunk = next(chunks, None)
            if chunk is None:
                exhausted = True
                break
            worker = idle.pop()
            worker.send_chunk(chunk, check_stop)
            busy[worker.connection] = (sent, worker)
            sent += 1
        while yielded in results:
            result = results.pop(yielded)
            yielded += 1
            if isinstance(result, DataError):
                raise result
            encoded, chunk_errors = result
            errors.merge(chunk_errors)
            yield encoded
        if not busy and exhausted and yielded == sent:
            return
        check_stop()
        for connection in wait(list(busy), timeout=_POLL_SECONDS):
            assert isinstance(connection, Connection)
            number, worker = busy.pop(connection)
            results[number] = worker.receive(check_stop)
            idle.append(worker)


class _Worker:
    """A process that answers every chunk with its encoded rows."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, child_connection = context.Pipe()
        self.process = context.Process(target=_run_worker, args=(child_connection,), daemon=True)
        # Ctrl-C reaches every process of a terminal, but only this one handles it and stops the workers: they inherit
        # a mask that blocks these signals. (Starting the resource tracker later would unblock them.)
        resource_tracker.ensure_running()
        former_mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former_mask)
            child_connection.close()

    def send_task(self, pickled_task: bytes) -> None:
        """Send the task; `wait_until_ready` notices where the process is dead."""
        with suppress(OSError):
            self.connection.send_bytes(pickled_task)

    def wait_until_ready(self, check_stop: Callable[[], None]) -> bool:
        """Wait until the process has unpickled its task; return whether it could."""
        try:
            while not self.connection.poll(_POLL_SECONDS):
                check_stop()
            return self.connection.recv() is True
        except (EOFError, OSError):
            return False

    def send_chunk(self, chunk: Chunk, check_stop: Callable[[], None]) -> None:
        """Send a chunk to the process, which must be idle."""
        try:
            self.connection.send(chunk)
        except OSError:
            self._raise_dead(check_stop)

    def receive(self, check_stop: Callable[[], None]) -> Result:
        """Return the result for the chunk that was sent."""
        try:
            result: Result = self.connection.recv()
            return result
        except (EOFError, OSError):
            return self._raise_dead(check_stop)

    def _raise_dead(self, check_stop: Callable[[], None]) -> Any:
        check_stop()
        self.process.join(timeout=5)
        code = self.process.exitcode
        reason = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = " The system may have run out of memory." if code == -signal.SIGKILL else ""
        raise RunnerError(
            f"A process that tokenizes the data ended unexpectedly ({reason}).{hint} Training has not started: start "
            "again, with fewer cores (taskset) if it happens again."
        )

    def stop(self) -> None:
        """Kill the process, whatever it is doing."""
        self.connection.close()
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()


def _run_worker(connection: Connection) -> None:
    """Encode chunks until the other end of `connection` is closed, which the death of its process does too."""
    try:
        task: EncodeTask = connection.recv()
    except Exception:  # a tokenizer that can be pickled may need code that this process cannot import
        return
    encoder = TextEncoder(task.tokenizer, task.template)
    with suppress(EOFError, OSError):
        connection.send(True)
        while True:
            chunk = connection.recv()
            errors = RowErrors()
            try:
                connection.send((encode_chunk(chunk, task, encoder, errors), errors))
            except DataError as error:
                connection.send(error)
