"""Display of a run: a live progress line on a terminal, plain lines elsewhere, and the log lines in run.log."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from runner.common.atomic_io import open_text
from runner.common.clock import utc_now
from runner.common.text import format_duration


class _QuietConsole(Console):
    """A console that falls silent when its reader is gone (`| head`), so that the run continues."""

    def on_broken_pipe(self) -> None:
        """Override of rich, which would end the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """Shows a run on `stream` and appends its lines to the file `log`; a context manager."""

    def __init__(
        self,
        log: Path,
        iters: int,
        memory: Callable[[], str],
        stream: TextIO | None = None,
        label: str | None = None,
        redact: Callable[[str], str] = str,
    ) -> None:
        """`memory` returns the memory in use, as text; `redact` removes secrets from a line.

        With a `label` the run shares the terminal with other jobs of a sweep: its lines go to run.log only, and the
        terminal shows the label with the progress and the outcome.
        """
        self._label = label
        self._redact = redact
        self._console = _QuietConsole(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._log = open_text(log)
        self._iters = iters
        self._memory = memory
        self._loss: float | None = None
        self._rate = _Rate()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()

    def line(self, text: str, style: str = "") -> None:
        """Write one line to run.log, and to the terminal where the run has it to itself."""
        text = self._redact(text)
        self._log.write(f"{utc_now()} {text}\n")
        self._log.flush()
        if self._label is None:
            self._console.print(Text(text, style=style))

    def job_line(self, text: str) -> None:
        """Print the outcome of a job that shares the terminal with others; does nothing for a run alone."""
        if self._label is not None:
            self._console.print(Text(f"{text}  {self._label}"))

    def set_iters(self, iters: int) -> None:
        """Set the number of updates of the run, where it was not known at first."""
        self._iters = iters

    def begin(self, step: int, stop_at: int | None = None) -> None:
        """Start the live line: training continues after update `step`, to `stop_at` or the end."""
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
        """Show an update on `tokens` tokens, padding excluded, that took `seconds`."""
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        self._rate.add(tokens, seconds)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=step,
                info=f"{step}/{self._iters}  loss {self._loss:.3f}  {self._speed(step)}",
            )

    def train_loss(self, step: int, loss: float, learning_rate: float) -> None:
        """Log the mean training loss since the last report."""
        self.line(f"step {step:>5}/{self._iters}  train loss {loss:.4f}  lr {learning_rate:.2e}  {self._speed(step)}")

    def valid_loss(self, step: int, loss: float, best: bool, measures: Mapping[str, float] | None = None) -> None:
        """Log a validation loss; `best` if it is the lowest so far. `measures`: what the method measured beside it."""
        beside = f"  {measures_text(measures)}" if measures else ""
        self.line(
            f"step {step:>5}/{self._iters}  valid loss {loss:.4f}{beside}{'  best' if best else ''}",
            "bold" if best else "",
        )

    def busy(self, activity: str) -> None:
        """Show what takes a while between two updates, on a terminal only."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, info=activity)

    def stop(self) -> None:
        """Remove the live line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _speed(self, step: int) -> str:
        remaining = format_duration(self._rate.seconds_per_update * max(0, self._iters - step))
        return f"{self._rate.tokens_per_second:.0f} tok/s  {remaining} left  {self._memory()}"


class SilentDisplay(Display):
    """Shows and logs nothing: the display of a rank that is not the first."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def line(self, text: str, style: str = "") -> None:
        """Discard the line."""

    def set_iters(self, iters: int) -> None:
        """Do nothing."""

    def begin(self, step: int, stop_at: int | None = None) -> None:
        """Show nothing."""

    def step(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Show nothing."""

    def train_loss(self, step: int, loss: float, learning_rate: float) -> None:
        """Log nothing."""

    def valid_loss(self, step: int, loss: float, best: bool, measures: Mapping[str, float] | None = None) -> None:
        """Log nothing."""

    def busy(self, activity: str) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Do nothing."""


class _Rate:
    """Tokens per second and seconds per update, averaged over about the last 30 updates."""

    def __init__(self) -> None:
        self._tokens = self._seconds = self._updates = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        decay = 29 / 30 if self._updates >= 29 else 1.0
        self._tokens = self._tokens * decay + tokens
        self._seconds = self._seconds * decay + seconds
        self._updates = self._updates * decay + 1

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def seconds_per_update(self) -> float:
        return self._seconds / self._updates if self._updates else 0.0


_SHOWN_MEASURES = ("reward_accuracy", "reward_margin", "reward", "kl")


def measures_text(measures: Mapping[str, float]) -> str:
    """Return what a method measured, such as "reward accuracy 0.71"; of rewards the ones that say most."""
    shown = [name for name in _SHOWN_MEASURES if name in measures]
    return ", ".join(f"{name.replace('_', ' ')} {measures[name]:.4g}" for name in shown)
