"""The page of one run: its figures, charts, answers before and after, checkpoints, settings and next commands."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.common import layout, safe_json
from runner.common.errors import RunnerError
from runner.common.filesystem import FileSystem
from runner.common.safe_json import finite_number
from runner.common.text import format_bytes, format_duration
from runner.config import schema
from runner.config.labels import Labels
from runner.reports import settings_text
from runner.reports.cells import parent_lines
from runner.reports.checkpoint_list import CheckpointInfo
from runner.reports.html import sections
from runner.reports.html.curves_of_runs import RunCurves
from runner.reports.html.page import Page
from runner.reports.html.sections import Column, Curve, Mark, Part, Row
from runner.reports.next_commands import command_fields
from runner.reports.run_page import RunPage, has_result, skipped_text
from runner.runs.find import is_sweep_folder
from runner.runs.inspect import RunInfo
from runner.runs.lineage import parents
from runner.runs.restarts import restart_summary
from runner.runs.rows import read_rows

REPORT = layout.REPORT
LOSS_DIGITS = 4
"""Digits behind the point of a loss or a score in a table."""
_MAX_STATE_BYTES = 64_000_000
_MAX_STATE_VALUES = 5_000_000
_MAX_SAMPLES = 40
_MAX_ANSWER = 4000
_MAX_REASON_LINES = 40
_MAX_NOTE_LINES = 20
_TRAIN_CHARTS = (
    # field of a row of metrics, title, axis
    ("learning_rate", "Learning rate", "of the update"),
    ("grad_norm", "Gradient norm", "norm before clipping"),
    ("tokens_per_second", "Throughput", "tokens per second"),
)
_MEMORY = (("peak_memory_gb", "peak"), ("active_memory_gb", "active"), ("cache_memory_gb", "cached"))


def run_report(page: RunPage) -> Page:
    """Return the page of a run."""
    run = page.run
    labels = label_fields(run.labels, run.tags, path_title(run.path))
    return Page(
        kind="run",
        title=labels["title"],
        tags=labels["tags"],
        folder=run.path,
        state=run.state,
        lines=[*labels["lines"], *_lines(run)],
        up=_link_to_sweep(run.path),
        hosts=[run.status.get("host")],
        parts=[
            sections.facts(_facts(page)),
            *_problems(run),
            sections.charts("Training", _charts(page), id="charts"),
            *_samples(run),
            *_checkpoints(page),
            *_settings(run),
            *_environment(page),
            *next_steps(command_fields(page.commands)),
        ],
    )


def path_title(path: Path) -> str:
    """Return the name of a directory, with that of the folder above it where it is a number or a time."""
    path = path.absolute()
    return f"{path.parent.name}/{path.name}" if path.name[:1].isdigit() and path.parent.name else path.name


def time_text(recorded: object) -> str:
    """Return a time of status.json in short form: ``2026-11-29 22:45 UTC``."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\dZ", str(recorded))
    return f"{match[1]} {match[2]} UTC" if match else str(recorded)


def next_steps(fields: Sequence[Mapping[str, str]]) -> list[Part]:
    """Return the commands to type next; to stop a process is none of them, since a page outlives it."""
    items = [field for field in fields if not field["words"].startswith("kill ")]
    note = "Typed where the run was started: paths are relative to that folder."
    return [sections.commands("How to continue", items, note=note)] if items else []


def label_fields(labels: Labels, tags: Sequence[str], path_title: str) -> dict[str, Any]:
    """Return title, lines and tags of a page about what is called `path_title`, unless it has a name."""
    lines = [path_title] if labels.name else []
    lines += (labels.note or "").splitlines()[:_MAX_NOTE_LINES]
    return {"title": labels.name or path_title, "lines": lines, "tags": [f"#{tag}" for tag in tags]}


def _lines(run: RunInfo) -> list[str]:
    progress = f"step {run.step:,} of {'?' if run.iters is None else f'{run.iters:,}'}" if run.step is not None else ""
    times = [f"{what} {time_text(run.status.get(what))}" for what in ("started", "ended") if run.status.get(what)]
    lines = [" · ".join(part for part in (progress, *times) if part), *parent_lines(parents(run)).splitlines()]
    lines += [f"restarts: {restarts}"] if (restarts := restart_summary(run.status)) else []
    lines += [f"skipped: {skipped}"] if (skipped := skipped_text(run)) else []
    return [line for line in lines if line]


def _facts(page: RunPage) -> list[tuple[str, str, str]]:
    run = page.run
    items = []
    if run.best_loss is not None:
        first = next((loss for step, loss in run.losses("valid") if step == 0), None)
        before = "" if first is None else f"{first:.4f} → "
        items.append(("valid loss", f"{before}{run.best_loss:.4f}", f"at step {run.best_step}"))
    for score in page.scores:
        sides = " → ".join(f"{side:.1%}" for side in (score.before, score.after) if side is not None)
        rows = "" if score.rows is None else f"on {score.rows} {score.split} rows"
        items.append((score.metric.replace("_", " "), sides, rows))
    if tested := run.losses("test"):
        items.append(("test loss", f"{tested[-1][1]:.4f}", ""))
    elif not items and (trained := run.losses("train")):
        items.append(("train loss", f"{trained[-1][1]:.4f}", f"at step {trained[-1][0]}"))
    seconds = finite_number(run.status.get("seconds"))
    items.append(("time", format_duration(seconds) if seconds is not None else "", "over all its resumes"))
    tokens = [value for row in run.rows if (value := finite_number(row.get("tokens"))) is not None]
    speeds = [v for row in _of_split(run.rows, "train") if (v := finite_number(row.get("tokens_per_second")))]
    speed = f"{statistics.median(speeds):,.0f} a second" if speeds else ""
    items.append(("tokens", f"{tokens[-1]:,.0f}" if tokens else "", speed))
    peaks = [value for row in run.rows if (value := finite_number(row.get("peak_memory_gb"))) is not None]
    items.append(("peak memory", f"{max(peaks):.2f} GB" if peaks else "", "of MLX's arrays"))
    return items


def _problems(run: RunInfo) -> list[Part]:
    found = []
    if run.reason and run.state != "finished":
        lines = run.reason.split("\n")[:_MAX_REASON_LINES]
        bad = run.state in ("failed", "diverged")
        found.append(sections.text(f"Why it {run.state}", lines, tone="bad" if bad else "plain", code=True))
    if run.problem:
        found.append(sections.text("Damaged files", run.problem.split("; "), tone="bad"))
    return found


def _charts(page: RunPage) -> list[Part]:
    curves = RunCurves(page.run)
    train, valid = curves.of("train", "train"), curves.of("valid", "valid")
    method = str(page.run.settings.get("method.name", "sft"))
    loss = sections.chart(
        "Loss",
        [train, valid],
        y=f"mean loss of {'a token' if method == 'sft' else 'an example'}",
        marks=_marks(page, valid, train),
        lower_is_better=True,
    )
    measures = [
        sections.chart(
            name.replace("_", " ").capitalize(),
            [curves.of(split, split, name) for split in ("train", "valid")],
            y=f"mean of {'the answers' if method == 'grpo' else 'the examples'}",
        )
        for name in schema.METHOD_MEASURES.get(method, ())
    ]
    others = [
        sections.chart(title, [curves.of("train", title.lower(), field)], y=y) for field, title, y in _TRAIN_CHARTS
    ]
    memory = [curves.of("train", name, field) for field, name in _MEMORY]
    return [loss, *measures, *others, sections.chart("Memory", memory, y="GB of arrays")]


def _marks(page: RunPage, valid: Curve, train: Curve) -> list[Mark]:
    marks = []
    for checkpoint in page.checkpoints:
        point = None if checkpoint.problem else _point_at(checkpoint, valid, train)
        if point is not None:
            is_result = checkpoint.step == page.result_step
            text = _mark_text(checkpoint, page.result_step)
            marks.append(Mark(text=text, x=point[0], y=point[1], strong=is_result))
    return marks


def _mark_text(checkpoint: CheckpointInfo, result_step: int | None) -> str:
    reasons = [*checkpoint.kept_for, *(["in adapters/"] if checkpoint.step == result_step else [])]
    return f"checkpoint {checkpoint.step}" + (f" ({', '.join(reasons)})" if reasons else "")


def _point_at(checkpoint: CheckpointInfo, *curves: Curve) -> tuple[dict[str, float], float] | None:
    """Return the point of the first of the curves that has the checkpoint's step; of the last one, the nearest."""
    for curve in curves:
        steps = curve.x["step"]
        nearest = min(range(len(steps)), key=lambda i: abs(steps[i] - checkpoint.step), default=None)
        is_last = curve is curves[-1]
        if nearest is not None and (steps[nearest] == checkpoint.step or is_last):
            value = curve.y[nearest]
            at = {axis: values[nearest] for axis, values in curve.x.items()}
            return None if value is None else (at, value)
    return None


def _of_split(rows: Sequence[Mapping[str, Any]], split: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row.get("split") == split]


def _samples(run: RunInfo) -> list[Part]:
    rows = [row for row in read_rows(run.path / layout.SAMPLES) if isinstance(row.get("row"), int)]
    if not rows:
        return []
    last = max(row["step"] for row in rows)
    before = {row["row"]: row for row in rows if row["step"] == 0}
    after = {row["row"]: row for row in rows if row["step"] == last and last > 0}
    numbers = sorted(before.keys() | after.keys(), key=_interest(before, after))
    items = [
        {
            "row": number,
            "prompt": _cut((after.get(number) or before[number]).get("prompt")),
            "expected": _cut((after.get(number) or before[number]).get("expected")),
            "before": _answer(before.get(number)),
            "after": _answer(after.get(number)),
        }
        for number in numbers[:_MAX_SAMPLES]
    ]
    of = f"{len(items)} of {len(numbers)} rows" if len(items) < len(numbers) else f"{len(items)} held-out rows"
    note = f"{of}; those whose answer changed from wrong to right or back come first."
    return [sections.samples("Answers before and after training", items, note=note if before and after else of)]


def _interest(before: Mapping[int, Any], after: Mapping[int, Any]) -> Callable[[int], tuple[bool, int]]:
    def is_right(row: Mapping[str, Any] | None) -> bool:
        return ((finite_number(row.get("score")) if row else None) or 0.0) >= 1

    return lambda number: (is_right(before.get(number)) == is_right(after.get(number)), number)


def _answer(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if row is None else {"text": _cut(row.get("text")), "score": finite_number(row.get("score"))}


def _cut(value: object) -> str:
    text = value if isinstance(value, str) else ""
    return text if len(text) <= _MAX_ANSWER else f"{text[:_MAX_ANSWER]} …"


def _checkpoints(page: RunPage) -> list[Part]:
    if not page.checkpoints:
        return []
    columns = [Column(title="step", number=True), Column(title="valid loss", number=True, digits=LOSS_DIGITS)]
    columns += [Column(title="size", number=True), Column(title="saved for"), Column(title="kept as")]
    rows = []
    for checkpoint in page.checkpoints:
        kept = checkpoint.problem or ", ".join(checkpoint.kept_for) or "removed at the next save"
        size = sections.shown(format_bytes(checkpoint.size_bytes), checkpoint.size_bytes)
        cells = [checkpoint.step, checkpoint.valid_loss, size, ", ".join(checkpoint.saved_for), kept]
        rows.append(Row(cells=cells))
    note = ""
    if has_result(page.run):
        step = "an unknown step" if page.result_step is None else f"step {page.result_step}"
        note = f"adapters/ holds {step}."
    return [sections.table("Checkpoints", columns, rows, id="checkpoints", note=note, sorted_by=(0, False))]


def _settings(run: RunInfo) -> list[Part]:
    changed = settings_text.changed_from_defaults(run.settings)
    rows = []
    for name, (value, default) in changed.items():
        default_text = "" if default in (None, schema.MISSING) else settings_text.value_text(default)
        rows.append(Row(cells=[name, settings_text.path_text(name, value), default_text]))
    columns = [Column(title="setting", code=True), Column(title="value", code=True), Column(title="default", code=True)]
    title = "Settings that differ from the defaults"
    return [sections.table(title, columns, rows, id="settings", sortable=False)] if rows else []


def _environment(page: RunPage) -> list[Part]:
    recorded = recorded_environment(page.checkpoints)
    if not recorded:
        return []
    rows = [Row(cells=[name, settings_text.value_text(value)]) for name, value in recorded.items()]
    columns = [Column(title="what"), Column(title="value", code=True)]
    return [sections.table("Environment", columns, rows, id="environment", sortable=False, closed=True)]


def recorded_environment(checkpoints: Sequence[CheckpointInfo]) -> dict[str, Any]:
    """Return versions, device and precision as the newest checkpoint recorded them; nothing where it has none."""
    for checkpoint in reversed(checkpoints):
        if checkpoint.problem is not None:
            continue
        path = checkpoint.path / layout.TRAIN_STATE
        try:
            content = FileSystem().read_file(path, _MAX_STATE_BYTES)
            state = safe_json.parse_object(content, max_values=_MAX_STATE_VALUES)
        except (RunnerError, ValueError):
            continue
        found = {}
        for section in ("environment", "precision"):
            values = state.get(section)
            found.update(_leaves(values) if isinstance(values, Mapping) else {})
        return found
    return {}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{name} ")
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found


def _link_to_sweep(path: Path) -> Part | None:
    """Return a link to the page of the sweep that a run is a job of."""
    parent = path.absolute().parent
    return sections.link(f"sweep {parent.name}", f"../{REPORT}") if is_sweep_folder(parent) else None
