"""The page of one run, printed by `runner show`: state, settings, curves, checkpoints, next commands."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.common.safe_json import finite_number
from runner.common.text import count, format_bytes, relative_path, shorten
from runner.reports import checkpoint_list, curves, settings_text
from runner.reports.cells import STATE_STYLES, format_age, format_time, label_lines, parent_lines, run_fields
from runner.reports.checkpoint_list import CheckpointInfo
from runner.reports.curves import Series
from runner.reports.next_commands import Command, command_fields, for_run
from runner.reports.screen import Screen
from runner.reports.tables import Column, TableRow
from runner.runs.inspect import RunInfo
from runner.runs.lineage import parents
from runner.runs.restarts import restart_summary
from runner.runs.rows import count_or_none

_MAX_REASON_LINES = 20
_LAST_ROWS = 5
_MAX_PLOT_WIDTH = 100
_CURVE_STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red", "bright_cyan", "bright_yellow")
_METRIC_COLUMNS = (
    # field of a row, title, format
    ("loss", "loss", ".4f"),
    ("score", "score", ".4f"),
    ("reward_accuracy", "accuracy", ".3f"),
    ("reward_margin", "margin", ".3g"),
    ("reward", "reward", ".3f"),
    ("learning_rate", "lr", ".3g"),
    ("grad_norm", "norm", ".3g"),
    ("tokens", "tokens", ",.0f"),
    ("tokens_per_second", "tok/s", ",.0f"),
    ("peak_memory_gb", "GB", ".2f"),
)


@dataclass(frozen=True)
class Score:
    """A metric of generated answers, before the first update (None where it was not measured) and after the last."""

    metric: str
    split: str
    rows: int | None
    before: float | None
    after: float | None


@dataclass(frozen=True)
class RunPage:
    """A run with its checkpoints, its result and its scores."""

    run: RunInfo
    checkpoints: list[CheckpointInfo]
    result_step: int | None
    scores: list[Score]

    @property
    def commands(self) -> list[Command]:
        """What to type next."""
        return for_run(self.run, self.checkpoints, has_result=has_result(self.run))


def read_run_page(run: RunInfo) -> RunPage:
    """Read what the page shows besides the run itself."""
    checkpoints = checkpoint_list.list_checkpoints(run)
    return RunPage(run, checkpoints, checkpoint_list.result_step(run, checkpoints), find_scores(run.rows))


def find_scores(rows: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Return the score at step 0 and the last later one, for each metric and split in a run's rows."""
    found: dict[tuple[str, str], dict[bool, Mapping[str, Any]]] = {}
    for row in rows:
        metric, split = row.get("metric"), row.get("split")
        if isinstance(metric, str) and isinstance(split, str) and finite_number(row.get("score")) is not None:
            found.setdefault((metric, split), {})[row["step"] > 0] = row
    scores = []
    for (metric, split), sides in found.items():
        count = (sides.get(True) or sides[False]).get("rows")
        before, after = (finite_number(sides[late].get("score")) if late in sides else None for late in (False, True))
        scores.append(Score(metric, split, count if type(count) is int else None, before, after))
    return scores


def has_result(run: RunInfo) -> bool:
    """Return whether the run has written adapters/."""
    return (run.path / "adapters" / "adapters.safetensors").is_file()


def run_page_fields(page: RunPage) -> dict[str, Any]:
    """Return the page as data for a JSON document."""
    run = page.run
    changed = settings_text.changed_from_defaults(run.settings)
    return {
        "kind": "run",
        **run_fields(run),
        "started": run.status.get("started"),
        "ended": run.status.get("ended"),
        "changed": {name: {"value": value, "default": default} for name, (value, default) in changed.items()},
        "settings": run.settings,
        "train": run.losses("train"),
        "valid": run.losses("valid"),
        "last_rows": run.rows[-_LAST_ROWS:],
        "checkpoints": [vars(checkpoint) for checkpoint in page.checkpoints],
        "adapters_step": page.result_step,
        "has_adapters": has_result(run),
        "skipped_updates": count_or_none(run.status.get("skipped_updates")) or 0,
        "scores": [vars(score) for score in page.scores],
        "commands": command_fields(page.commands),
    }


def print_run_page(page: RunPage, screen: Screen) -> None:
    """Print the page."""
    run = page.run
    screen.line((relative_path(run.path), "bold"))
    progress = f" at step {run.step} of {'?' if run.iters is None else run.iters}" if run.step is not None else ""
    age = f"  (last update {format_age(time.time() - run.updated)} ago, {format_time(run.updated)})"
    screen.line((run.state, STATE_STYLES.get(run.state, "")), progress, (age, "dim"))
    for line in label_lines(run.labels, run.tags):
        screen.line(line)
    labelled = {"reason": run.reason, "damaged": run.problem, "parent": parent_lines(parents(run))}
    labelled |= {"restarts": restart_summary(run.status), "skipped": skipped_text(run)}
    for label, text in labelled.items():
        if isinstance(text, str):
            for i, line in enumerate(text.splitlines()[:_MAX_REASON_LINES]):
                screen.line(f"{label if i == 0 else '':<9}{line}")
    _print_losses(run, screen)
    for score in page.scores:
        sides = [f"{side:.1%}" for side in (score.before, score.after) if side is not None]
        rows = f" on {score.rows} {score.split} rows" if score.rows is not None else ""
        note = "" if score.after is not None else " (before training)"
        screen.line(f"{score.metric} {' -> '.join(sides)}{rows}{note}")
    _print_settings(run, screen)
    series = [Series("valid", run.losses("valid"), mark="o"), Series("train", run.losses("train"))]
    if any(curve.points for curve in series):
        screen.heading("loss")
        print_plot(series, screen, height=12)
    _print_rows(run.rows[-_LAST_ROWS:], screen)
    _print_checkpoints(page, screen)
    print_commands(page.commands, screen)


def skipped_text(run: RunInfo) -> str | None:
    """Return how many updates were skipped because their loss or gradient was not finite; None if none was."""
    skipped = count_or_none(run.status.get("skipped_updates"))
    return f"{count(skipped, 'update')}, whose loss or gradient was not finite" if skipped else None


def print_commands(commands: Sequence[Command], screen: Screen) -> None:
    """Print the commands uncut, so that they can be copied."""
    if commands:
        screen.heading("next commands")
        width = max(len(command.purpose) for command in commands)
        for command in commands:
            screen.line("  ", (f"{command.purpose:<{width}}", "dim"), f"  {command.line}")


def print_plot(
    series: Sequence[Series], screen: Screen, height: int, y_label: str = "loss", x_label: str = "step"
) -> None:
    """Print the curves as wide as the screen, up to 100 columns."""
    width = min(screen.width or 80, _MAX_PLOT_WIDTH)
    ascii_only = not screen.draws_braille
    labels = {"x_label": x_label, "y_label": y_label}
    for line in curves.plot(series, width=width, height=height, ascii_only=ascii_only, **labels):
        screen.line(*[(text, "" if index is None else _CURVE_STYLES[index % 8]) for text, index in line])


def _print_losses(run: RunInfo, screen: Screen) -> None:
    if run.best_loss is not None:
        baseline = next((loss for step, loss in run.losses("valid") if step == 0), None)
        first = f"{baseline:.4f} -> " if baseline is not None else ""
        step = f" (step {run.best_step})" if run.best_step is not None else ""
        screen.line(f"valid loss {first}{run.best_loss:.4f}{step}")
    if tested := run.losses("test"):
        _, loss = tested[-1]
        is_sft = run.settings.get("method.name", "sft") == "sft"
        screen.line(f"test loss  {loss:.4f}" + (f", perplexity {math.exp(min(loss, 700)):.3f}" if is_sft else ""))


def _print_settings(run: RunInfo, screen: Screen) -> None:
    changed = settings_text.changed_from_defaults(run.settings)
    if not changed:
        return
    screen.heading("settings that differ from the defaults")
    rows = []
    for name, (value, default) in changed.items():
        default_text = "" if default in (None, "???") else settings_text.value_text(default)
        rows.append(TableRow([f"  {name}", settings_text.path_text(name, value), default_text], {2: "dim"}))
    columns = [Column("  setting"), Column("value"), Column("default", wrap=True)]
    screen.table(columns, rows)


def _print_rows(rows: Sequence[Mapping[str, Any]], screen: Screen) -> None:
    if not rows:
        return
    screen.heading("last rows of metrics.jsonl")
    shown = [column for column in _METRIC_COLUMNS if any(finite_number(row.get(column[0])) is not None for row in rows)]
    columns = [Column("  step", right=True), Column("split"), *[Column(title, right=True) for _, title, _ in shown]]
    lines = []
    for row in rows:
        cells = [_cell(row.get(field), form) for field, _, form in shown]
        lines.append(TableRow([str(row["step"]), str(row.get("split", "")), *cells]))
    screen.table(columns, lines)


def _print_checkpoints(page: RunPage, screen: Screen) -> None:
    if not page.checkpoints and not has_result(page.run):
        return
    screen.heading("checkpoints (not verified)")
    columns = [
        Column("  step", right=True),
        Column("valid_loss", right=True),
        Column("size", right=True),
        Column("saved for"),
        Column("retained as", wrap=True),
    ]
    rows = []
    for checkpoint in page.checkpoints:
        retained = ", ".join(checkpoint.kept_for) or "removed at the next save"
        cells = [
            str(checkpoint.step),
            _cell(checkpoint.valid_loss, ".4f"),
            format_bytes(checkpoint.size_bytes),
            shorten(", ".join(checkpoint.saved_for), 60),
            checkpoint.problem or retained,
        ]
        rows.append(TableRow(cells, {4: "red"} if checkpoint.problem else {}))
    if rows:
        screen.table(columns, rows)
    if has_result(page.run):
        step = "an unknown step" if page.result_step is None else f"step {page.result_step}"
        screen.line(f"  adapters/ holds {step}")


def _cell(value: Any, form: str) -> str:
    number = finite_number(value)
    return "" if number is None else format(number, form)
