"""Progress of a run: a live line on a terminal, plain lines elsewhere; what matters also goes to run.log."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from runner.common.atomic_io import open_text
from runner.common.clock import utc_now
from runner.common.text import format_duration


class _Screen(Console):
    """A console that falls silent where its reader went away (| head): the run goes on, and run.log has it all."""

    def on_broken_pipe(self) -> None:
        """Called by rich, which would end the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """Shows a run on `stream` and keeps its lines in `log`. A context manager."""

    def __init__(
        self,
        log: Path,
        iters: int,
        memory_gb: Callable[[], float],
        stream: TextIO | None = None,
        label: str | None = None,
        veil: Callable[[str], str] = str,
    ) -> None:
        """`memory_gb` gives the peak memory so far, in GB (1e9 bytes); `veil` takes out of a line what is secret.

        With a `label`, the run is one of many: its lines go to run.log only, the screen shows `label` and its end.
        """
        self._label = label
        self._veil = veil
        self._console = _Screen(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._log = open_text(log)
        self._iters = iters
        self._memory_gb = memory_gb
        self._loss: float | None = None
        self._rate = _Rate()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        self._log.close()

    def line(self, text: str, style: str = "") -> None:
        """One line, on the screen and in run.log."""
        text = self._veil(text)
        self._log.write(f"{utc_now()} {text}\n")
        self._log.flush()
        if self._label is None:
            self._console.print(Text(text, style=style))

    def one_line(self, text: str, style: str = "") -> None:
        """What a run that is one of many says at its end."""
        if self._label is not None:
            self._console.print(Text(f"{text}  {self._label}", style=style))

    def begin(self, step: int, stop_at: int | None = None) -> None:
        """Training begins, or goes on, after `step`."""
        self._iters = stop_at or self._iters
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[info]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=True, expand=True)
            self._task = self._bar.add_task(self._label or "training", total=self._iters, completed=step, info="")
            self._bar.start()

    def step(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """An update was made on `tokens` real tokens in `seconds`."""
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        self._rate.add(tokens, seconds)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=step,
                info=f"{step}/{self._iters}  loss {self._loss:.3f}  {self._tail(step)}",
            )

    def report(self, step: int, loss: float, learning_rate: float) -> None:
        """The training loss of a report window."""
        self.line(f"step {step:>5}/{self._iters}  train loss {loss:.4f}  lr {learning_rate:.2e}  {self._tail(step)}")

    def evaluated(self, step: int, loss: float, best: bool) -> None:
        """A validation loss."""
        self.line(
            f"step {step:>5}/{self._iters}  valid loss {loss:.4f}{'  best' if best else ''}",
            "bold" if best else "",
        )

    def busy(self, what: str) -> None:
        """Something between updates takes a while: shown on a terminal only."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, info=what)

    def stop(self) -> None:
        """Take the live line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _tail(self, step: int) -> str:
        left = format_duration(self._rate.seconds_per_update * max(0, self._iters - step))
        return f"{self._rate.tokens_per_second:.0f} tok/s  {left} left  {self._memory_gb():.2f} GB"


class _Rate:
    """Tokens per second and seconds per update, over about the last 30 updates."""

    def __init__(self) -> None:
        self._tokens = self._seconds = self._updates = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        keep = 29 / 30 if self._updates >= 29 else 1.0
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds
        self._updates = self._updates * keep + 1

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def seconds_per_update(self) -> float:
        return self._seconds / self._updates if self._updates else 0.0
