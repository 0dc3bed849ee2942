"""Export an adapter in one format: write it beside its place, load it again, compare it with the run, then rename."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.common.atomic_io import create_atomically
from runner.common.errors import RunnerError
from runner.common.text import count
from runner.export.fidelity import ExportError, FidelityCheck, FidelityRows, LossesByRow, Measured
from runner.export.target import Target
from runner.export.trained_adapter import TrainedAdapter
from runner.models.lora import Params


@dataclass(frozen=True)
class FidelityReference:
    """What base and run compute on the rows that are compared."""

    rows: FidelityRows
    base: LossesByRow
    run: Measured


def measure_run(trained: TrainedAdapter, row_count: int, log: Callable[[str], None]) -> FidelityReference:
    """Measure the base model and the run on `row_count` validation rows.

    Raises:
        DataError: the data set cannot be read.
    """
    adapted = trained.with_weights(trained.weights)
    rows = FidelityRows(trained.config, adapted.base, row_count, log)
    log(f"comparing on {count(rows.row_count, f'{rows.split} row')}")
    base = rows.losses(adapted, adapted.without_effect(trained.weights))
    return FidelityReference(rows, base, rows.measure(adapted, trained.weights))


def export(
    trained: TrainedAdapter,
    target: Target,
    path: Path,
    reference: FidelityReference | None,
    *,
    force: bool,
    finish: Callable[[TrainedAdapter, FidelityCheck | None, Path], None] = lambda trained, check, path: None,
) -> FidelityCheck | None:
    """Write the export to `path` and compare it with the run, all or nothing; return the comparison.

    Args:
        reference: what the run computes; None where it cannot be compared, which `force` accepts.
        force: keep an export that does not pass.
        finish: called before the export gets its name, with the comparison and where the export lies until then.

    Raises:
        ExportError: the export does not compute what the run does. Nothing is left of it.
        ModelError, StorageError: it cannot be written, or not be loaded. Nothing is left of it.
        ConfigError: `path` exists by then.
    """
    with create_atomically(path, is_folder=path.suffix not in (".gguf", ".npz")) as draft:
        target.write(trained, draft)
        check = None
        if reference is not None:
            check = _compare(trained, target, draft, reference, force)
        finish(trained, check, draft)
    return check


def _compare(
    trained: TrainedAdapter, target: Target, draft: Path, reference: FidelityReference, force: bool
) -> FidelityCheck | None:
    try:
        measured = target.measure(trained, draft, reference.rows)
    except RunnerError as error:
        if not force:
            raise
        trained.log(f"the export cannot be loaded again (--force): {error}")
        return None
    check = FidelityCheck(reference.base, reference.run, measured, target.limit)
    if not check.passes and not force:
        figures = check_lines(check, None, trained.name)[0]
        raise ExportError(
            f"Nothing was exported, because {check.problem(trained.name)}. {figures}. --force exports it."
        )
    return check


def check_lines(check: FidelityCheck, metric: str | None, name: str) -> list[str]:
    """Return the figures of a comparison as lines for a person; `name` is that of what is exported."""
    base, run, export = check.base.mean, check.run.losses.mean, check.export.losses.mean
    line = f"loss: base {base:.4f}, {name} {run:.4f}, export {export:.4f}"
    if base > run:
        line += f", {(base - export) / (base - run):.1%} of the gain"
    lines = [f"{line}; deviation {check.deviation:.2%} of the adapter's effect on the rows"]
    if check.run.score is not None and check.export.score is not None:
        lines.append(f"{metric}: {name} {check.run.score:.1%}, export {check.export.score:.1%}")
    return lines


def check_values(check: FidelityCheck) -> dict[str, Any]:
    """Return the figures of a comparison for a JSON document."""
    return {
        "rows": len(check.base.tokens),
        "base_loss": check.base.mean,
        "run_loss": check.run.losses.mean,
        "export_loss": check.export.losses.mean,
        "deviation": check.deviation,
        "limit": check.limit,
        "passes": check.passes,
        "run_score": check.run.score,
        "export_score": check.export.score,
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
    trained: TrainedAdapter, reference: FidelityReference, steps: list[int], single_step: int, single: Params
) -> AverageReport:
    """Measure the best single checkpoint, whose weights have the average's rank, beside the average."""
    single_loss = reference.rows.losses(trained.with_weights(single), single).mean
    return AverageReport(steps, reference.run.losses.mean, single_step, single_loss)
