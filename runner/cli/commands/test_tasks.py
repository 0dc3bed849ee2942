"""`runner test --tasks`: tasks of lm-eval with the adapter on, and with --base without it."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.backends import blas
from runner.cli.commands import adapter_source, arguments, stored_settings
from runner.common.atomic_io import write_atomically
from runner.common.clock import utc_now
from runner.common.errors import ConfigError, StorageError
from runner.common.layout import EVALUATIONS
from runner.common.text import relative_path
from runner.reports.screen import Screen, json_document
from runner.reports.tables import Column, TableRow

if TYPE_CHECKING:
    from runner.inference.harness import TaskOptions

_STDERR = "_stderr"


def test_tasks(options: Namespace) -> int:
    """Evaluate the adapter that `options` name, write the results into the run's directory and print a table.

    Raises:
        RunnerError: lm-eval is not installed, a task cannot be evaluated, or the adapter cannot be used.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-eval, which is not installed: pip install 'mlx-runner[lm-eval]'")
    source = adapter_source.find_adapter(Path(options.run), options.checkpoint)
    settings = stored_settings.read_settings(source.run, options.overrides)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars of progress
    blas.load_blas()
    from runner.cli.commands.load_adapter import load_adapter
    from runner.inference.harness import HarnessModel, TaskOptions, check_tasks, run_tasks
    from runner.inference.prompts import PromptEncoder

    names = [name for name in options.tasks.split(",") if name]
    folders = [Path(folder).expanduser() for folder in options.include or []]
    asked = TaskOptions(
        tasks=names, include=folders, limit=options.limit, shots=options.num_fewshot, use_template=False
    )
    manager = check_tasks(asked)
    loaded = load_adapter(source, settings, any_base=options.any_base, log=arguments.print_note)
    encoder = PromptEncoder(loaded.base.tokenizer, settings.config)
    asked.use_template = encoder.uses_template and not options.no_chat_template
    model = HarnessModel(
        loaded.base,
        encoder,
        tokens_at_once=settings.config.train.eval_tokens,
        use_template=asked.use_template,
    )
    found = {"adapter": run_tasks(model, asked, manager)}
    if options.base:
        loaded.detach()
        found["base"] = run_tasks(model, asked, manager)
    document = {
        "run": str(source.run),
        "adapter": str(source.folder),
        "step": source.step,
        "time": utc_now(),
        "lm_eval": version("lm_eval"),
        **_asked(asked),
        "evaluations": found,
    }
    if not options.json:  # before what may fail
        template = "the run's chat template" if asked.use_template else "no chat template"
        _print_table(found)
        print(f"lm-eval {document['lm_eval']}, {source.name}, {template}")
    file = _write(source.run, document)
    if options.json:
        arguments.print_json({**document, "file": str(file)})
    else:
        print(f"wrote {relative_path(file)}")
    return 0


def _asked(options: TaskOptions) -> dict[str, Any]:
    return {
        "tasks": options.tasks,
        "limit": options.limit,
        "num_fewshot": options.shots,
        "chat_template": options.use_template,
    }


def _write(run: Path, document: Mapping[str, Any]) -> Path:
    """Write the results into a new file of the run's directory and return its path.

    Raises:
        StorageError: it cannot be written.
    """
    folder = run / EVALUATIONS
    step = "result" if document["step"] is None else f"step-{document['step']:07d}"
    moment = datetime.fromisoformat(document["time"]).strftime("%Y%m%d-%H%M%S")
    file = folder / f"{step}.{moment}.json"
    number = 1
    while file.exists():
        number += 1
        file = folder / f"{step}.{moment}-{number}.json"
    try:
        folder.mkdir(exist_ok=True)
        write_atomically(file, json_document(document) + "\n")
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror}.") from None
    return file


def _print_table(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a row per metric: its value with the standard error of each model, and the difference."""
    kinds = ["base", "adapter"] if "base" in found else ["adapter"]
    columns = [Column("task"), Column("metric"), Column("rows", right=True), Column("shots", right=True)]
    columns += [Column(kind, right=True) for kind in kinds]
    columns += [Column("difference", right=True)] if "base" in found else []
    rows = []
    adapter = found["adapter"]
    for task, metrics in adapter["results"].items():
        for key, value in metrics.items():
            name, _, filter_name = key.partition(",")
            if not isinstance(value, int | float) or not filter_name or name.endswith(_STDERR):
                continue
            shown = name if filter_name == "none" else f"{name} ({filter_name})"
            samples = (adapter.get("n-samples", {}).get(task) or {}).get("effective", "")
            cells = [task, shown, str(samples), str(adapter.get("n-shot", {}).get(task, ""))]
            values = [found[kind]["results"].get(task, {}) for kind in kinds]
            cells += [_with_error(of_model, name, filter_name) for of_model in values]
            if "base" in found:
                before = values[0].get(key)
                cells.append(_decimal(value - before, sign="+") if isinstance(before, int | float) else "")
            rows.append(TableRow(cells))
    Screen().table(columns, rows)


def _with_error(metrics: Mapping[str, Any], name: str, filter_name: str) -> str:
    value, error = metrics.get(f"{name},{filter_name}"), metrics.get(f"{name}{_STDERR},{filter_name}")
    if not isinstance(value, int | float):
        return ""
    return f"{_decimal(value)} ± {_decimal(error)}" if isinstance(error, int | float) else _decimal(value)


def _decimal(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 1e6 else f"{value:{sign}.4g}"
