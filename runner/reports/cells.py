"""What tables and documents say of a run, cell by cell."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from runner.runs.inspect import RunInfo, SweepInfo


def age_text(seconds: float) -> str:
    """How long ago: ``45s``, ``12m``, ``3h``, ``5d``."""
    whole = max(0, int(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if whole >= size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def loss_text(loss: float | None, step: int | None) -> str:
    """The best loss and where it was: ``0.6876 @40``."""
    if loss is None:
        return "-"
    return f"{loss:.4f}" if step is None else f"{loss:.4f} @{step}"


def step_text(run: RunInfo) -> str:
    """``40/1000``."""
    return f"{'-' if run.step is None else run.step}/{'?' if run.iters is None else run.iters}"


def notes_of(run: RunInfo) -> list[str]:
    """What a line about a run cannot say in its columns: why it failed, what is damaged."""
    told = []
    if run.reason and run.state in ("failed", "diverged"):
        told.append(f"{run.state}: {run.reason}")
    if run.problem:
        told.append(f"damaged: {run.problem}")
    return told


def states_text(sweep: SweepInfo) -> str:
    """``3 finished, 1 failed``."""
    return ", ".join(f"{count} {state}" for state, count in sweep.states.items()) or "no runs"


def state_of(sweep: SweepInfo) -> str:
    """The state that asks most for a look, of a sweep's runs."""
    there = sweep.states
    return next((state for state in ("failed", "diverged", "unknown", "running", "interrupted") if state in there), "")


def run_fields(run: RunInfo) -> dict[str, Any]:
    """What a JSON document says of a run beside its settings."""
    return {
        "path": run.path,
        "state": run.state,
        "reason": run.reason,
        "problem": run.problem,
        "step": run.step,
        "iters": run.iters,
        "best": best_fields(run) if run.best_loss is not None else None,
        "updated": time_text(run.updated),
        "size_bytes": run.size_bytes,
    }


def best_fields(run: RunInfo) -> dict[str, Any]:
    """The best evaluation, as status.json has it."""
    return {"valid_loss": run.best_loss, "step": run.best_step}


def time_text(seconds: float) -> str | None:
    """Seconds since 1970 as UTC text, as the status has it; None where that is no date."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return None
