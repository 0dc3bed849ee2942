"""One process of a run that `benchmarks.distributed` measures: it makes updates only while it is told to.

    python -m benchmarks.distributed_rank RESULT UPDATES [--spin] WORDS …

RESULT is the file that gets the times of its updates (JSON). Each line on standard input is leave to make UPDATES
updates, and each line on standard output says that they are made; the first one, that the first may begin.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.backends import blas

blas.load_blas()  # before MLX is imported

import mlx.core as mx  # noqa: E402

from runner.cli.main import main as run_program  # noqa: E402
from runner.training.train_step import TrainStep  # noqa: E402
from runner.training.trainer import Trainer  # noqa: E402
from runner.training.world import Ranks, World  # noqa: E402

_BARE_SUMS = 50


class Clock:
    """Seconds, and CPU seconds of all threads of this process, since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, time.process_time() - self._cpu


class Measured:
    """What is measured, in the place of the program's own functions."""

    def __init__(self, updates_at_once: int, replies: int, *, spin: bool) -> None:
        self._at_once, self._replies, self._spin = updates_at_once, replies, spin
        self.updates: list[dict[str, float]] = []
        self.bare_sums: list[float] = []
        """Seconds of the same message alone, between ranks that have nothing else to do."""
        self._clock = Clock()
        self._now: dict[str, float] = {}
        self._messages: list[int] = []
        """Bytes of each message of the update in progress."""

    def install(self) -> None:
        """Take the place of the program's functions."""
        Trainer.update = self._around_update(Trainer.update)  # type: ignore[method-assign, assignment]
        TrainStep.update = self._around_step(TrainStep.update)  # type: ignore[method-assign]
        Ranks.barrier = self._around_barrier(Ranks.barrier)  # type: ignore[method-assign, assignment]
        for kind in (World, Ranks):
            kind.sum_update = self._around_sum(kind.sum_update)  # type: ignore[method-assign]
        mx.distributed.all_sum = self._around_message(mx.distributed.all_sum)

    def _around_update(self, update: Callable[[Trainer], None]) -> Callable[[Trainer], None]:
        def measured(trainer: Trainer) -> None:
            if len(self.updates) % self._at_once == 0:
                os.write(self._replies, b"\n")
                if not sys.stdin.readline():
                    sys.exit("the measuring process has ended")
            self._now, self._messages, self._clock = {"wait": 0.0}, [], Clock()
            update(trainer)
            seconds, cpu = self._clock.read()
            sizes = {"messages": len(self._messages), "bytes": sum(self._messages)}
            self.updates.append({**self._now, **sizes, "update": seconds, "cpu": cpu})
            if trainer.state.progress.step == trainer.plan.iters:
                if isinstance(trainer.world, Ranks):
                    self._sum_alone(trainer.world, sum(self._messages))
                os.write(self._replies, b"\n")

        return measured

    def _around_step(self, update: Any) -> Any:
        def measured(*arguments: Any) -> Any:
            made = update(*arguments)
            self._now["tokens"] = made.tokens
            return made

        return measured

    def _around_sum(self, sum_update: Any) -> Any:
        def measured(world: World, sums: Any) -> Any:
            mx.eval(sums.arrays)
            self._now["compute"], self._now["compute_cpu"] = self._clock.read()
            start = Clock()
            added = sum_update(world, sums)
            mx.eval(added.arrays)
            seconds, self._now["sum_cpu"] = start.read()
            self._now["transfer"] = seconds - self._now["wait"]
            return added

        return measured

    def _around_barrier(self, barrier: Callable[[Ranks], None]) -> Callable[[Ranks], None]:
        def measured(world: Ranks) -> None:
            start = Clock()
            if not self._spin:
                barrier(world)
            self._now["wait"] += start.read()[0]

        return measured

    def _around_message(self, all_sum: Any) -> Any:
        def counted(array: mx.array, **options: Any) -> mx.array:
            self._messages.append(array.nbytes)
            return all_sum(array, **options)

        return counted

    def _sum_alone(self, world: Ranks, size: int) -> None:
        array = mx.zeros(size // 4, mx.float32)
        mx.eval(array)
        for _ in range(_BARE_SUMS):
            world.barrier()
            start = Clock()
            mx.eval(mx.distributed.all_sum(array, group=world._group))
            self.bare_sums.append(start.read()[0])


def main() -> int:
    """Train, and write the result."""
    result, at_once, *words = sys.argv[1:]
    replies = os.dup(1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    measured = Measured(int(at_once), replies, spin="--spin" in words)
    measured.install()
    code = run_program([word for word in words if word != "--spin"])
    Path(result).write_text(json.dumps({"updates": measured.updates, "bare_sums": measured.bare_sums}))
    return code


if __name__ == "__main__":
    sys.exit(main())
