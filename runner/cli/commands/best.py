"""`runner best`: print the path of the best run below a folder or in a sweep, and nothing else, for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runner.checkpoints.retention import best_checkpoint
from runner.cli.commands import arguments
from runner.cli.commands.selection import Selection, SelectionParser, select
from runner.common.errors import ConfigError, did_you_mean
from runner.common.text import relative_path, single_line
from runner.reports.fields import FIELDS, Field
from runner.reports.screen import json_document
from runner.runs.inspect import RunInfo
from runner.runs.objective import Objective

_EXAMPLES = """\
examples:
  runner generate "$(runner best outputs)" '…'
  runner best outputs/sweeps/2026-11-24/10-00-00 'lora.rank<=8' --by test_loss
  runner export "$(runner best --tag sql --checkpoint)" --to fused
"""


def run(argv: list[str]) -> int:
    """Print the path of the best of the runs that `argv` selects.

    Raises:
        ConfigError: a wrong argument, or no run has the metric.
    """
    parser = SelectionParser("best", "folder to look below, a sweep or a run", _EXAMPLES)
    parser.add_argument(
        "--by", metavar="METRIC", help="valid_loss, test_loss, score, …; default: what the runs set as objective.metric"
    )
    parser.add_argument("--checkpoint", action="store_true", help="its checkpoint with the lowest validation loss")
    options = parser.parse_intermixed_args(argv)
    selection = select(options.path, options.filters, options.tag)
    objective = _objective_by(options.by, selection.runs) if options.by else _common_objective(selection.runs)
    metric = FIELDS[objective.metric]
    best, value = _find_best(selection, objective, metric)
    if len(methods := _methods_of(selection.runs, metric)) > 1:
        arguments.print_note(
            f"The {metric.name} of {' and '.join(methods)} are on different scales: --by score, or method={methods[0]}."
        )
    path = _best_checkpoint(best) if options.checkpoint else best.path
    if options.json:
        others = {single.metric: single.value(best) for single in objective.others}
        print(json_document({"path": path, "run": best.path, "metric": metric.name, "value": value, "others": others}))
    else:
        print(single_line(relative_path(path)))
    return 0


def _find_best(selection: Selection, objective: Objective, metric: Field) -> tuple[RunInfo, float]:
    """Return the best run and its value; of equal ones the one that began first, by its path. One that diverged counts
    for nothing."""

    def value(run: RunInfo) -> float | None:
        return None if run.state == "diverged" else metric.value(run)

    best = objective.best(sorted(selection.runs, key=lambda run: str(run.path)), value)
    found = None if best is None else value(best)
    if best is None or found is None:
        root = relative_path(selection.root)
        which = "that passes the filters " if selection.filters else ""
        raise ConfigError(f"{root}: no run {which}has a {metric.name}. What there is: python -m runner ls {root}")
    return best, found


def _methods_of(runs: Sequence[RunInfo], metric: Field) -> list[str]:
    """Return the training methods of the runs that have `metric`, if it is a loss: each method has its own."""
    if not metric.name.endswith("_loss"):
        return []
    return sorted({str(run.setting("method.name")) for run in runs if metric.value(run) is not None})


def _common_objective(runs: Sequence[RunInfo]) -> Objective:
    """Return the objective of all `runs`.

    Raises:
        ConfigError: they have different ones.
    """
    objectives = list(dict.fromkeys(Objective.of(run.settings) for run in runs))
    if len(objectives) > 1:
        names = ", ".join(sorted({objective.text for objective in objectives}))
        raise ConfigError(f"The runs have different objectives ({names}): choose one with --by METRIC, or filter.")
    return objectives[0] if objectives else Objective()


def _objective_by(name: str, runs: Sequence[RunInfo]) -> Objective:
    """Return the objective of a typed metric; the direction is the runs' own where that metric is their objective."""
    field = FIELDS.get(name)
    if field is None or field.higher_is_better is None:
        known = [metric.name for metric in FIELDS.values() if metric.higher_is_better is not None]
        raise ConfigError(f"--by {name}: must be one of {', '.join(dict.fromkeys(known))}.{did_you_mean(name, known)}")
    own = {found.maximize for run in runs if (found := Objective.of(run.settings)).metric == field.name}
    return Objective(field.name, own.pop() if len(own) == 1 else field.higher_is_better)


def _best_checkpoint(run: RunInfo) -> Path:
    from runner.reports.checkpoint_list import list_checkpoints  # imports NumPy, which the path of a run does without

    best = best_checkpoint(checkpoint for checkpoint in list_checkpoints(run) if checkpoint.problem is None)
    if best is None:
        raise ConfigError(f"{relative_path(run.path)}: none of its checkpoints was evaluated. Leave out --checkpoint.")
    return best.path
