"""The page about one run: from its directory to lines on a screen, or to a document."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from runner.common.text import format_bytes, relative_path
from runner.reports import checkpoint_list, curves, next_commands, settings_text
from runner.reports.cells import age_text, run_fields, time_text
from runner.reports.checkpoint_list import CheckpointInfo
from runner.reports.curves import Series
from runner.reports.tables import STATE_STYLES, Column, Screen, TableRow, table
from runner.runs.inspect import RunInfo

LAST_ROWS = 5
WIDEST_PLOT = 100
CURVE_STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red", "bright_cyan", "bright_yellow")
_ROW_FIELDS = ("loss", "score", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_memory_gb")
_ROW_TITLES = ("loss", "score", "lr", "norm", "tokens", "tok/s", "GB")
_ROW_FORMS = (".4f", ".4f", ".3g", ".3g", ",.0f", ",.0f", ".2f")


@dataclass(frozen=True)
class Score:
    """A metric of generated answers, before the first update (None where it was not measured) and after the last."""

    metric: str
    split: str
    rows: int | None
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Page:
    """A run with what lies in its directory."""

    run: RunInfo
    checkpoints: list[CheckpointInfo]
    result: int | None
    scores: list[Score]


def read(run: RunInfo) -> Page:
    """Read what the page needs beside the run itself."""
    checkpoints = checkpoint_list.list_checkpoints(run)
    return Page(run, checkpoints, checkpoint_list.result_step(run, checkpoints), scores_of(run.rows))


def scores_of(rows: list[dict[str, Any]]) -> list[Score]:
    """The scores of generated answers in a run's rows, a metric and split each: at step 0, and at the last step."""
    found: dict[tuple[str, str], dict[bool, dict[str, Any]]] = {}
    for row in rows:
        metric, split = row.get("metric"), row.get("split")
        if isinstance(metric, str) and isinstance(split, str) and _number(row.get("score")) is not None:
            found.setdefault((metric, split), {})[row["step"] > 0] = row
    scores = []
    for (metric, split), sides in found.items():
        rows_counted = (sides.get(True) or sides[False]).get("rows")
        before, after = (_number(sides[late].get("score")) if late in sides else None for late in (False, True))
        scores.append(Score(metric, split, rows_counted if type(rows_counted) is int else None, before, after))
    return scores


def fields(page: Page) -> dict[str, Any]:
    """The page as data, for a JSON document."""
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
        "last_rows": run.rows[-LAST_ROWS:],
        "checkpoints": [
            {
                "step": one.step,
                "path": one.path,
                "valid_loss": one.valid_loss,
                "size_bytes": one.size_bytes,
                "kept_for": one.kept_for,
                "problem": one.problem,
            }
            for one in page.checkpoints
        ],
        "adapters_step": page.result,
        "has_adapters": has_adapters(run),
        "scores": [vars(score) for score in page.scores],
        "commands": command_fields(_commands(page)),
    }


def show(page: Page, screen: Screen) -> None:
    """Print the page."""
    run = page.run
    screen.line((relative_path(run.path), "bold"))
    at = f" at step {run.step} of {'?' if run.iters is None else run.iters}" if run.step is not None else ""
    age = f"  (last update {age_text(time.time() - run.updated)} ago, {time_text(run.updated)})"
    screen.line((run.state, STATE_STYLES.get(run.state, "")), at, (age, "dim"))
    for label, text in (("reason", run.reason), ("damaged", run.problem), ("parent", run.status.get("parent"))):
        if isinstance(text, str):
            for i, line in enumerate(text.splitlines()[:20]):
                screen.line(f"{label if i == 0 else '':<9}{line}")
    if run.best_loss is not None:
        baseline = next((loss for step, loss in run.losses("valid") if step == 0), None)
        start = f"{baseline:.4f} -> " if baseline is not None else ""
        at = f" (step {run.best_step})" if run.best_step is not None else ""
        screen.line(f"valid loss {start}{run.best_loss:.4f}{at}")
    _show_tests(run, screen)
    for score in page.scores:
        sides = [f"{side:.1%}" for side in (score.before, score.after) if side is not None]
        rows = f" on {score.rows} {score.split} rows" if score.rows is not None else ""
        which = "" if score.after is not None else " (before training)"
        screen.line(f"{score.metric} {' -> '.join(sides)}{rows}{which}")
    _show_settings(run, screen)
    _show_curves(run, screen)
    _show_rows(run.rows[-LAST_ROWS:], screen)
    _show_checkpoints(page, screen)
    show_commands(_commands(page), screen)


def show_commands(known: list[next_commands.Command], screen: Screen) -> None:
    """Print the commands uncut, so that they can be copied."""
    if known:
        heading("next commands", screen)
        width = max(len(command.purpose) for command in known)
        for command in known:
            screen.line("  ", (f"{command.purpose:<{width}}", "dim"), f"  {command.line}")


def command_fields(commands: list[next_commands.Command]) -> list[dict[str, str]]:
    """Return the commands for a JSON document."""
    return [{"what": command.purpose, "words": command.line} for command in commands]


def show_plot(series: list[Series], screen: Screen, height: int, y_label: str = "loss") -> None:
    """The curves, as wide as the screen up to WIDEST_PLOT columns."""
    width = min(screen.width or 80, WIDEST_PLOT)
    ascii_only = not screen.draws_braille
    for line in curves.draw(series, width=width, height=height, y_label=y_label, ascii_only=ascii_only):
        screen.line(*[(text, "" if index is None else CURVE_STYLES[index % 8]) for text, index in line])


def heading(text: str, screen: Screen) -> None:
    """The title of a part of the page."""
    screen.line("")
    screen.line((text, "bold"))


def has_adapters(run: RunInfo) -> bool:
    """Whether the run has a result."""
    return (run.path / "adapters" / "adapters.safetensors").is_file()


def _commands(page: Page) -> list[next_commands.Command]:
    return next_commands.for_run(page.run, page.checkpoints, has_result=has_adapters(page.run))


def _show_tests(run: RunInfo, screen: Screen) -> None:
    tested = run.losses("test")
    if tested:
        loss = tested[-1][1]
        screen.line(f"test loss  {loss:.4f}, perplexity {math.exp(min(loss, 700)):.3f}")


def _show_settings(run: RunInfo, screen: Screen) -> None:
    changed = settings_text.changed_from_defaults(run.settings)
    if not changed:
        return
    heading("settings that differ from the defaults", screen)
    rows = []
    for name, (value, default) in changed.items():
        told = "" if default in (None, "???") else settings_text.value_text(default)
        rows.append(TableRow([f"  {name}", settings_text.path_text(name, value), told], {2: "dim"}))
    columns = [Column("  setting"), Column("value"), Column("default", cut=True)]
    screen.lines(table(columns, rows, screen.width))


def _show_curves(run: RunInfo, screen: Screen) -> None:
    series = [Series("valid", run.losses("valid"), mark="o"), Series("train", run.losses("train"))]
    if any(one.points for one in series):
        heading("loss", screen)
        show_plot(series, screen, height=12)


def _show_rows(rows: list[dict[str, Any]], screen: Screen) -> None:
    if not rows:
        return
    heading("last rows of metrics.jsonl", screen)
    told = [i for i, name in enumerate(_ROW_FIELDS) if any(_number(row.get(name)) is not None for row in rows)]
    columns = [Column("  step", right=True), Column("split"), *[Column(_ROW_TITLES[i], right=True) for i in told]]
    listed = []
    for row in rows:
        cells = [_cell(row.get(_ROW_FIELDS[i]), _ROW_FORMS[i]) for i in told]
        listed.append(TableRow([str(row["step"]), str(row.get("split", "")), *cells]))
    screen.lines(table(columns, listed, screen.width))


def _show_checkpoints(page: Page, screen: Screen) -> None:
    if not page.checkpoints and not has_adapters(page.run):
        return
    heading("checkpoints (not verified here)", screen)
    columns = [
        Column("  step", right=True),
        Column("valid_loss", right=True),
        Column("size", right=True),
        Column("kept because", cut=True),
    ]
    rows = []
    for one in page.checkpoints:
        why = ", ".join(one.kept_for) if one.kept_for else "goes with the next save"
        cells = [str(one.step), _cell(one.valid_loss, ".4f"), format_bytes(one.size_bytes), one.problem or why]
        rows.append(TableRow(cells, {3: "red"} if one.problem else {}))
    if rows:
        screen.lines(table(columns, rows, screen.width))
    if has_adapters(page.run):
        of = "of a step that is not known" if page.result is None else f"of step {page.result}"
        screen.line(f"  adapters/ is {of}")


def _cell(value: Any, form: str) -> str:
    number = _number(value)
    return "" if number is None else format(number, form)


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and -1e300 < value < 1e300 else None
