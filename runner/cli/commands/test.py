"""`runner test`: loss, perplexity and the data set's metric of a run on held-out rows, or tasks of lm-eval."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from runner.backends import blas
from runner.cli.commands import adapter_source, arguments, stored_settings, test_rows
from runner.common.errors import ConfigError
from runner.config.schema import Config
from runner.reports.progress import measures_text

if TYPE_CHECKING:
    from runner.training.generate import GenerationResult

_TASK_OPTIONS = ("limit", "num_fewshot", "include", "no_chat_template", "base")


def run(argv: list[str]) -> int:
    """Evaluate the adapter that `argv` names; the loss is the mean over the supervised tokens of the split.

    Raises:
        RunnerError: a wrong argument, or an adapter, base model or data set that cannot be used.
    """
    options = _parse(argv)
    if options.tasks is not None:
        from runner.cli.commands.test_tasks import test_tasks

        return test_tasks(options)
    if options.all:
        from runner.cli.commands.test_all import test_all

        return test_all(options)
    source = adapter_source.find_adapter(Path(options.run), options.checkpoint)
    settings = stored_settings.read_settings(source.run, options.overrides)
    test_rows.require_split(settings, options.split)
    config = settings.config
    metric_rows = test_rows.count_metric_rows(options.rows, config)
    blas.load_blas()
    from runner.cli.commands.evaluation import SplitEvaluation
    from runner.cli.commands.load_adapter import load_adapter

    loaded = load_adapter(source, settings, any_base=options.any_base, log=arguments.print_note)
    fields, scored = SplitEvaluation(loaded, config, options.split, metric_rows).measure()
    if options.json:
        names = {"run": str(source.run), "adapter": str(source.folder), "step": source.step}
        answers = {} if scored is None else {"answers": [vars(answer) for answer in scored.answers]}
        arguments.print_json({**names, "data": config.data.path, "split": options.split, **fields, **answers})
        return 0
    beside = f"perplexity {fields['perplexity']:.3f}" if "perplexity" in fields else measures_text(fields)
    print(
        f"{options.split} loss {fields['loss']:.4f}, {beside}: {source.name}, "
        f"{fields['supervised_tokens']:,} tokens of {fields['rows']:,} rows, {fields['seconds']:.1f} s"
    )
    if scored is not None:
        _print_samples(scored, config)
    return 0


def _parse(argv: list[str]) -> Namespace:
    parser = arguments.AdapterParser("test")
    parser.add_argument("--split", choices=("test", "valid", "train"), help="rows to measure (default: test)")
    parser.add_argument("--rows", type=int, help="rows to answer and score, -1 for all (default: data.metric_rows)")
    parser.add_argument(
        "--all", action="store_true", help="a table of all kept checkpoints of a run, or of all jobs of a sweep"
    )
    tasks = parser.add_argument_group("lm-eval (pip install 'mlx-runner[lm-eval]')")
    tasks.add_argument("--tasks", metavar="A,B", help="tasks of lm-eval, or YAML files, instead of the split")
    positive = arguments.number(int, lambda n: n >= 1, "1 or more")
    tasks.add_argument("--limit", type=positive, metavar="N", help="documents of each task (default: all)")
    shots = arguments.number(int, lambda n: n >= 0, "0 or more")
    tasks.add_argument("--num-fewshot", type=shots, metavar="N", help="examples before each (default: the task's own)")
    tasks.add_argument("--include", action="append", metavar="FOLDER", help="a folder with more tasks")
    tasks.add_argument("--base", action="store_true", help="also evaluate without the adapter")
    tasks.add_argument(
        "--no-chat-template", action="store_true", help="ask in plain text also where the run has a chat template"
    )
    options = parser.parse(argv)
    for name in () if options.tasks is not None else _TASK_OPTIONS:
        if getattr(options, name):
            raise ConfigError(f"--{name.replace('_', '-')} needs --tasks.")
    if options.tasks is not None and (options.all or options.rows is not None or options.split):
        raise ConfigError("--tasks takes no --all, --rows or --split: tasks have rows of their own.")
    if options.all and options.checkpoint:
        raise ConfigError("--all tests every checkpoint; without it, --checkpoint chooses one.")
    options.split = options.split or "test"
    return options


def _print_samples(scored: GenerationResult, config: Config) -> None:
    from runner.reports import run_summary

    answers = {answer.row: vars(answer) for answer in scored.answers}
    samples = [(None, answers[row]) for row in run_summary.select_samples({}, answers)]
    for line in run_summary.score_lines(str(config.data.metric), len(answers), None, scored.score, samples):
        print(line)
