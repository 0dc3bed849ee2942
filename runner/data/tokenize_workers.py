"""Processes that make tokens of the pieces of a file; what comes back is in the file's order, as if made by one."""

from __future__ import annotations

import io
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from runner.common.cores import usable_cores
from runner.common.errors import DataError, RunnerError
from runner.data.chat_spans import TextEncoder
from runner.data.encode import Chunk, EncodedChunk, encode_chunk, encode_rows
from runner.data.formats import EncodeOptions, RowFormat, choose_format
from runner.data.jsonl import empty_file, parse_lines
from runner.data.row_errors import RowErrors

PARALLEL_FROM = 8 << 20
"""Bytes of JSONL. A worker takes two to three seconds to start, and one process makes tokens of 0.3 MB (conversations
of 200 characters) to 1.4 MB (of 2,000) a second: 8 MB take it 6 to 25 s."""
MOST = 8
"""Workers. Each takes about 100 MB for the libraries and as much again as the tokenizer does."""
_LOOK = 0.2  # seconds between two looks at whether to stop
_AHEAD = 4  # results for each worker that may wait for one before them

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

Answer = tuple[EncodedChunk, RowErrors] | DataError
Parts = Generator[EncodedChunk, None, None]


@dataclass(frozen=True)
class Task:
    """What is done with every piece."""

    path: Path
    chosen: RowFormat | None
    tokenizer: Any
    reading: EncodeOptions


def workers_for(size: int) -> int:
    """How many processes a file of `size` bytes is worth; 0 where this one does it best alone."""
    cores = usable_cores()
    # A process that was itself started as a daemon (by a launcher of sweeps, say) may not have children.
    alone = size < PARALLEL_FROM or cores < 2 or multiprocessing.current_process().daemon
    return 0 if alone else min(cores, MOST)


def encode_here(task: Task, pieces: Iterator[Chunk], bad: RowErrors, each: Callable[[], None]) -> Parts:
    """The parts of `pieces`, made in this process; `each` is called before every piece and may raise.

    The first row decides the format where `task` has none.

    Raises:
        DataError: as `encode_piece`; no format for the first row; an empty file.
    """
    encoder, chosen, before = TextEncoder(task.tokenizer), task.chosen, bad.count
    for piece in pieces:
        each()
        rows = parse_lines(io.BytesIO(piece.lines), task.path, bad, piece.first)
        if chosen is None and (row := next(rows, None)) is not None:
            chosen = choose_format(row, encoder, task.reading)
            rows = chain([row], rows)
        if chosen is not None:
            yield encode_rows(rows, chosen, encoder, task.reading, bad)
    if chosen is None and bad.count == before:
        raise empty_file(task.path)


def encode_apart(task: Task, pieces: Iterator[Chunk], bad: RowErrors, each: Callable[[], None], count: int) -> Parts:
    """The parts of `pieces`, made by `count` processes, in their order; `each` is called often and may raise.

    Does the work in this process where others cannot be started, or cannot be sent the tokenizer. Ends the processes
    however it is left; they end by themselves where this one is killed.

    Raises:
        DataError: as `encode_piece`, at the first piece of the file that has a reason.
        RunnerError: a process ended before its work.
    """
    workers: list[_Worker] = []
    try:
        with suppress(Exception):  # of many kinds: tokenizers are, and a system may refuse another process
            message = bytes(ForkingPickler.dumps(task))
            for _ in range(count):
                workers.append(_Worker())
            for worker in workers:
                worker.send(message)
        if len(workers) == count and all([worker.is_ready(each) for worker in workers]):
            yield from _in_order(workers, pieces, bad, each)
        else:
            yield from encode_here(task, pieces, bad, each)
    finally:
        for worker in workers:
            worker.end()


def _in_order(
    workers: list[_Worker], pieces: Iterator[Chunk], bad: RowErrors, each: Callable[[], None]
) -> Iterator[EncodedChunk]:
    answers: dict[int, Answer] = {}
    working: dict[Connection, tuple[int, _Worker]] = {}
    free = list(workers)
    given = told = 0
    more = True
    while True:
        while more and free and given < told + _AHEAD * len(workers):
            piece = next(pieces, None)
            if piece is None:
                more = False
                break
            worker = free.pop()
            worker.give(piece, each)
            working[worker.connection] = (given, worker)
            given += 1
        while told in answers:
            answer = answers.pop(told)
            told += 1
            if isinstance(answer, DataError):
                raise answer
            part, own = answer
            bad.merge(own)
            yield part
        if not working and not more and told == given:
            return
        each()
        for ready in wait(list(working), timeout=_LOOK):
            assert isinstance(ready, Connection)
            number, worker = working.pop(ready)
            answers[number] = worker.take(each)
            free.append(worker)


class _Worker:
    """A process that answers each piece with its part."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        # Ctrl-C reaches every process of a terminal. Only the first one answers it, and ends the others: they
        # inherit a mask that holds these signals back. (The tracker's start would lift it.)
        resource_tracker.ensure_running()
        former = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
            theirs.close()

    def send(self, task: bytes) -> None:
        """Tell the process its task."""
        with suppress(OSError):  # it is gone, which `is_ready` finds
            self.connection.send_bytes(task)

    def is_ready(self, each: Callable[[], None]) -> bool:
        """Whether the process understood its task; waits for that."""
        try:
            while not self.connection.poll(_LOOK):
                each()
            return self.connection.recv() is True
        except (EOFError, OSError):
            return False

    def give(self, piece: Chunk, each: Callable[[], None]) -> None:
        """Hand over a piece; the process has to be free."""
        try:
            self.connection.send(piece)
        except OSError:
            self._died(each)

    def take(self, each: Callable[[], None]) -> Answer:
        """The answer to the piece that was handed over."""
        try:
            answer: Answer = self.connection.recv()
            return answer
        except (EOFError, OSError):
            return self._died(each)

    def _died(self, each: Callable[[], None]) -> Any:
        each()
        self.process.join(timeout=5)
        code = self.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        hint = " The system may have run out of memory." if code == -signal.SIGKILL else ""
        raise RunnerError(
            f"A process that makes tokens of the data ended too early ({how}).{hint} Nothing was trained yet: start "
            "again, with fewer cores (taskset) if it happens again."
        )

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self.connection.close()
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()


def _work(connection: Connection) -> None:
    """What a process does: answers until its other end is closed, or gone with its process."""
    try:
        task: Task = connection.recv()
    except Exception:  # a tokenizer that can be sent need not arrive: its code may not be here
        return
    encoder = TextEncoder(task.tokenizer)
    with suppress(EOFError, OSError):
        connection.send(True)
        while True:
            piece = connection.recv()
            bad = RowErrors()
            try:
                part = encode_chunk(piece, task.path, task.chosen, encoder, task.reading, bad)
                connection.send((part, bad))
            except DataError as error:
                connection.send(error)
