"""What tables and JSON documents show of a run or a sweep, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from runner.common.text import relative_path
from runner.config.labels import Labels
from runner.runs.find import SweepInfo
from runner.runs.inspect import RunInfo
from runner.runs.labels import read_labels
from runner.runs.lineage import Parent, parents
from runner.runs.restarts import read_restarts, restart_summary

_MAX_NOTE_LINES = 20
STATE_STYLES = {
    "running": "cyan",
    "finished": "green",
    "stopped": "yellow",
    "interrupted": "yellow",
    "failed": "red",
    "diverged": "red",
    "unknown": "red",
}


def format_age(seconds: float) -> str:
    """Format an age as ``45s``, ``12m``, ``3h`` or ``5d``."""
    whole = max(0, int(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if whole >= size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def format_best(run: RunInfo) -> str:
    """Format the lowest validation loss and its step: ``0.6876 @40``."""
    if run.best_loss is None:
        return "-"
    return f"{run.best_loss:.4f}" + ("" if run.best_step is None else f" @{run.best_step}")


def format_labels(labels: Labels) -> str:
    """Format the name and the tags: ``baseline #sql #final``."""
    return " ".join([*filter(None, [labels.name]), *(f"#{tag}" for tag in labels.tags)])


def label_lines(labels: Labels, tags: Sequence[str]) -> list[str]:
    """Return the lines that show the labels on a page, with all `tags` that apply."""
    lines = [f"name     {labels.name}"] if labels.name else []
    lines += [f"tags     {' '.join(f'#{tag}' for tag in tags)}"] if tags else []
    note = (labels.note or "").splitlines()
    return lines + [f"{'note' if i == 0 else '':<9}{line}" for i, line in enumerate(note[:_MAX_NOTE_LINES])]


def parent_lines(found: Sequence[Parent]) -> str:
    """Format where a run comes from, a line each: ``branch at 20 of outputs/2026-11-24/10-00-00 (baseline)``."""
    lines = []
    for parent in found:
        name = read_labels(parent.run).name
        note = f" ({name})" if name else "" if parent.run.exists() else " (gone)"
        lines.append(f"{parent.text} of {relative_path(parent.run)}{note}")
    return "\n".join(lines)


def format_progress(run: RunInfo) -> str:
    """Format the updates made and wanted: ``40/1000``."""
    return f"{'-' if run.step is None else run.step}/{'?' if run.iters is None else run.iters}"


def format_states(sweep: SweepInfo) -> str:
    """Format the states of a sweep's runs: ``3 finished, 1 failed``."""
    return ", ".join(f"{count} {state}" for state, count in sweep.states.items()) or "no runs"


def format_time(seconds: float) -> str | None:
    """Format seconds since 1970 as UTC, as status.json does; None where they are no valid date."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return None


def run_notes(run: RunInfo) -> list[str]:
    """Return what does not fit into columns: its restarts, why it failed, and what of its directory is damaged."""
    notes = []
    if restarts := restart_summary(run.status):
        notes.append(f"restarts: {restarts}")
    if run.reason and run.state in ("failed", "diverged"):
        notes.append(f"{run.state}: {run.reason}")
    if run.problem:
        notes.append(f"damaged: {run.problem}")
    return notes


def sweep_style(sweep: SweepInfo) -> str:
    """Return the style of a sweep: that of the state of its runs that most needs attention."""
    order = ("failed", "diverged", "unknown", "running", "interrupted")
    return next((STATE_STYLES[state] for state in order if state in sweep.states), "")


def run_fields(run: RunInfo) -> dict[str, Any]:
    """Return the fields of a run in a JSON document, its settings excluded."""
    return {
        "path": run.path,
        "name": run.labels.name,
        "tags": run.tags,
        "note": run.labels.note,
        "parents": [parent.to_dict() for parent in parents(run)],
        "state": run.state,
        "reason": run.reason,
        "problem": run.problem,
        "step": run.step,
        "iters": run.iters,
        "best": None if run.best_loss is None else best_fields(run),
        "updated": format_time(run.updated),
        "size_bytes": run.size_bytes,
        "restarts": read_restarts(run.status),
    }


def best_fields(run: RunInfo) -> dict[str, Any]:
    """Return the best evaluation, in the form of status.json."""
    return {"valid_loss": run.best_loss, "step": run.best_step}


def sweep_fields(sweep: SweepInfo) -> dict[str, Any]:
    """Return the fields of a sweep in a JSON document, its runs excluded."""
    best = sweep.best
    return {
        "path": sweep.path,
        "name": sweep.labels.name,
        "tags": sweep.labels.tags,
        "note": sweep.labels.note,
        "problem": sweep.problem,
        "states": sweep.states,
        "best": None if best is None else {"run": best.path.name, **best_fields(best)},
        "updated": format_time(sweep.updated),
        "size_bytes": sweep.size_bytes,
    }
