"""The lines printed when a run ends: outcome, losses, paths, next commands, and generated answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from runner.common.layout import REPORT
from runner.common.text import format_duration, printable, shell_path
from runner.reports.next_commands import Command, command_lines

SAMPLES = 3
"""Generated answers that are shown."""
_MAX_ANSWER_LENGTH = 300


def summary_lines(
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
    lines.append(f"report      {shell_path(path / REPORT)}")
    return [*lines, *command_lines(commands)]


def score_lines(
    metric: str,
    rows: int,
    before: float | None,
    after: float,
    samples: Sequence[tuple[Mapping[str, Any] | None, Mapping[str, Any]]],
) -> list[str]:
    """Return the lines that show the metric of generated answers before and after training, and sample answers.

    `samples` are pairs (answer before, answer after) with the keys prompt, expected, text and score.
    """
    first = f"{before:.1%} -> " if before is not None else ""
    lines = [f"{metric} on {rows} held-out rows: {first}{after:.1%}"]
    for answer_before, answer in samples:
        lines += ["", *_indented("prompt  ", answer["prompt"]), *_indented("expected", answer["expected"])]
        if answer_before is not None:
            lines += _indented("before  ", answer_before["text"], answer_before["score"])
        lines += _indented("after   ", answer["text"], answer["score"])
    return lines


def select_samples(before: Mapping[int, Mapping[str, Any]], after: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Return the rows to show: in turn one that became right, one that is wrong, one that was right before.

    Every kind is shown, so that the samples are not successes alone.
    """
    gained: list[int] = []
    wrong: list[int] = []
    right_before: list[int] = []
    for row, answer in sorted(after.items()):
        was_right = row in before and before[row]["score"] >= 1
        (wrong if answer["score"] < 1 else right_before if was_right else gained).append(row)
    in_turn = [row for rows in zip_longest(gained, wrong, right_before) for row in rows if row is not None]
    return sorted(in_turn[:SAMPLES])


def _indented(label: str, text: str, score: float | None = None) -> list[str]:
    verdict = "" if score is None else ("  [right]" if score >= 1 else "  [wrong]")
    shown = printable(text.strip())
    shown = shown if len(shown) <= _MAX_ANSWER_LENGTH else f"{shown[:_MAX_ANSWER_LENGTH]} …"
    first, *rest = shown.splitlines() or [""]
    return [
        f"  {label}  {first}{verdict if not rest else ''}",
        *[f"            {line}" for line in rest[:-1]],
        *[f"            {line}{verdict}" for line in rest[-1:]],
    ]
