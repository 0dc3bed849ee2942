"""The lines at the end of a run: what became of it, what it learned, what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from runner.common.text import format_duration, printable, shell_path
from runner.reports.next_commands import Command

SAMPLES = 3


def end_of_run(
    path: Path,
    *,
    state: str,
    reason: str,
    step: int,
    iters: int,
    seconds: float,
    tokens: int,
    baseline: float | None,
    best: Mapping[str, Any] | None,
    result_step: int | None,
    peak_memory_gb: float,
    commands: Sequence[Command],
) -> list[str]:
    """Return the summary of a run that finished or stopped: outcome, losses, paths, and the commands to type next."""
    cause = f" ({reason})" if reason != state else ""
    duration = format_duration(seconds)
    lines = [f"{state}{cause} at step {step} of {iters} after {duration}: {tokens:,} tokens, {peak_memory_gb:.2f} GB"]
    if best is not None:
        first = f"{baseline:.4f} -> " if baseline is not None else ""
        lines.append(f"valid loss  {first}{best['valid_loss']:.4f} (step {best['step']})")
    lines.append(f"run         {shell_path(path)}")
    if result_step is not None:
        lines.append(f"adapter     {shell_path(path / 'adapters')} (step {result_step})")
    return [*lines, *command_lines(commands)]


def command_lines(commands: Sequence[Command]) -> list[str]:
    """Return a line for each command, its purpose in front."""
    width = max([11, *(len(command.purpose) for command in commands)])
    return [f"{command.purpose:<{width}} {command.line}" for command in commands]


def before_and_after(
    metric: str,
    rows: int,
    before: float | None,
    after: float,
    samples: Sequence[tuple[Mapping[str, Any] | None, Mapping[str, Any]]],
) -> list[str]:
    """The data set's metric before and after training, and a few answers side by side.

    `samples` are (answer before, answer after) with the keys prompt, expected, text and score.
    """
    start = f"{before:.1%} -> " if before is not None else ""
    lines = [f"{metric} on {rows} held-out rows: {start}{after:.1%}"]
    for first, last in samples:
        lines += ["", *_indented("prompt  ", last["prompt"]), *_indented("expected", last["expected"])]
        if first is not None:
            lines += _indented("before  ", first["text"], first["score"])
        lines += _indented("after   ", last["text"], last["score"])
    return lines


def pick_samples(before: Mapping[int, Mapping[str, Any]], after: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Rows to show: one that was gained, one that is still wrong, one that was right before, then more of these.

    Chosen to show each kind, never only successes.
    """
    gained: list[int] = []
    wrong: list[int] = []
    kept: list[int] = []
    for row, answer in sorted(after.items()):
        right_before = row in before and before[row]["score"] >= 1
        (wrong if answer["score"] < 1 else kept if right_before else gained).append(row)
    in_turn = [row for rows in zip_longest(gained, wrong, kept) for row in rows if row is not None]
    return sorted(in_turn[:SAMPLES])


def _indented(label: str, text: str, score: float | None = None, limit: int = 300) -> list[str]:
    mark = "" if score is None else ("  [right]" if score >= 1 else "  [wrong]")
    shown = printable(text.strip())
    shown = shown if len(shown) <= limit else f"{shown[:limit]} …"
    first, *rest = shown.splitlines() or [""]
    return [
        f"  {label}  {first}{mark if not rest else ''}",
        *[f"            {line}" for line in rest[:-1]],
        *[f"            {line}{mark}" for line in rest[-1:]],
    ]
