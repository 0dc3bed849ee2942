"""Export an adapter in one format: write it beside its place, load it again, compare it with the run, then rename."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.common.atomic_io import create_atomically
from runner.common.errors import RunnerError
from runner.common.text import count
from runner.export.job import ExportJob, Target
from runner.export.proof import Comparison, ExportError, Measured, RowLosses, Verdict, without_effect
from runner.models.lora import Params


@dataclass(frozen=True)
class Baseline:
    """What base and run compute on the rows of a comparison."""

    comparison: Comparison
    base: RowLosses
    run: Measured


def measure_run(job: ExportJob, rows: int, log: Callable[[str], None]) -> Baseline:
    """Measure the base model and the run on `rows` validation rows.

    Raises:
        DataError: the data set cannot be read.
    """
    adapted = job.with_weights(job.weights)
    comparison = Comparison(job.config, adapted.base, rows, log)
    log(f"comparing on {count(comparison.row_count, f'{comparison.split} row')}")
    base = comparison.losses(adapted, without_effect(job.weights))
    return Baseline(comparison, base, comparison.measure(adapted, job.weights))


def export(
    job: ExportJob,
    target: Target,
    path: Path,
    baseline: Baseline | None,
    *,
    force: bool,
    finish: Callable[[ExportJob, Verdict | None, Path], None] = lambda job, verdict, path: None,
) -> Verdict | None:
    """Write the export to `path` and compare it with the run, all or nothing; return the comparison.

    Args:
        baseline: what the run computes; None where it cannot be compared, which `force` accepts.
        force: keep an export that does not pass.
        finish: called before the export gets its name, with the comparison and where the export lies until then.

    Raises:
        ExportError: the export does not compute what the run does. Nothing is left of it.
        ModelError, StorageError: it cannot be written, or not be loaded. Nothing is left of it.
        ConfigError: `path` exists by then.
    """
    with create_atomically(path, is_folder=path.suffix not in (".gguf", ".npz")) as draft:
        target.write(job, draft)
        verdict = None
        if baseline is not None:
            verdict = _compare(job, target, draft, baseline, force)
        finish(job, verdict, draft)
    return verdict


def _compare(job: ExportJob, target: Target, draft: Path, baseline: Baseline, force: bool) -> Verdict | None:
    try:
        measured = target.measure(job, draft, baseline.comparison)
    except RunnerError as error:
        if not force:
            raise
        job.log(f"the export cannot be loaded again (--force): {error}")
        return None
    verdict = Verdict(baseline.base, baseline.run, measured, target.limit)
    if not verdict.passes and not force:
        figures = verdict_lines(verdict, None, job.name)[0]
        raise ExportError(f"Nothing was exported, because {verdict.problem(job.name)}. {figures}. --force exports it.")
    return verdict


def verdict_lines(verdict: Verdict, metric: str | None, name: str) -> list[str]:
    """Return the figures of a comparison as lines for a person; `name` is that of what is exported."""
    base, run, export = verdict.base.mean, verdict.run.losses.mean, verdict.export.losses.mean
    line = f"loss: base {base:.4f}, {name} {run:.4f}, export {export:.4f}"
    if base > run:
        line += f", {(base - export) / (base - run):.1%} of the gain"
    lines = [f"{line}; deviation {verdict.deviation:.2%} of the adapter's effect on the rows"]
    if verdict.run.score is not None and verdict.export.score is not None:
        lines.append(f"{metric}: {name} {verdict.run.score:.1%}, export {verdict.export.score:.1%}")
    return lines


def verdict_values(verdict: Verdict) -> dict[str, Any]:
    """Return the figures of a comparison for a JSON document."""
    return {
        "rows": len(verdict.base.tokens),
        "base_loss": verdict.base.mean,
        "run_loss": verdict.run.losses.mean,
        "export_loss": verdict.export.losses.mean,
        "deviation": verdict.deviation,
        "limit": verdict.limit,
        "passes": verdict.passes,
        "run_score": verdict.run.score,
        "export_score": verdict.export.score,
    }


@dataclass(frozen=True)
class AverageReport:
    """How an average of checkpoints compares with the best of the run's checkpoints, on the same rows."""

    steps: list[int]
    loss: float
    single_step: int
    single_loss: float

    @property
    def line(self) -> str:
        """The comparison as a line for a person; says where the average is worse."""
        text = (
            f"average of the steps {', '.join(map(str, self.steps))}: loss {self.loss:.4f}; "
            f"the best single checkpoint, step {self.single_step}: {self.single_loss:.4f}"
        )
        if self.loss > self.single_loss:
            return f"{text}. The average is worse: --checkpoint {self.single_step} exports the better one"
        return f"{text}. The average is better"


def report_average(
    job: ExportJob, baseline: Baseline, steps: list[int], single_step: int, single: Params
) -> AverageReport:
    """Measure the best single checkpoint, whose weights have the average's rank, beside the average."""
    single_loss = baseline.comparison.losses(job.with_weights(single), single).mean
    return AverageReport(steps, baseline.run.losses.mean, single_step, single_loss)
