"""`runner test`: loss, perplexity and the data set's metric of a run or checkpoint on held-out rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.backends import blas
from runner.cli.commands import adapter_source, arguments, stored_settings
from runner.common.errors import ConfigError, DataError
from runner.config.schema import Config
from runner.data.source import find_sources

if TYPE_CHECKING:
    from runner.cli.commands.load_adapter import LoadedAdapter
    from runner.data.tokenize import TokenizedDataset
    from runner.training.generate import GenerationResult


def run(argv: list[str]) -> int:
    """Evaluate the adapter that `argv` names; the loss is the mean over the supervised tokens of the split.

    Raises:
        RunnerError: a wrong argument, or an adapter, base model or data set that cannot be used.
    """
    parser = arguments.AdapterParser("test")
    parser.add_argument("--split", choices=("test", "valid", "train"), default="test")
    parser.add_argument("--rows", type=int, help="rows to answer and score, -1 for all (default: data.metric_rows)")
    options = parser.parse(argv)
    source = adapter_source.find_adapter(Path(options.run), options.checkpoint)
    settings = stored_settings.read_settings(source.run, options.overrides)
    config = settings.config
    if "train.eval_batches" not in settings.typed:
        config.train.eval_batches = -1
    metric_rows = _metric_rows(options.rows, config)
    if options.split not in _splits_of(config):
        raise DataError(
            f"{config.data.path} has no {options.split} split. Another split: --split valid. Other data: data.path=…"
        )
    blas.load_blas()
    from runner.backends.hidden_caches import hidden_caches
    from runner.backends.select import select_backend
    from runner.cli.commands.load_adapter import load_adapter
    from runner.data.formats import EncodeOptions
    from runner.data.token_cache import open_token_cache
    from runner.data.tokenize import load_sources
    from runner.training.dataloader import evaluation_loader
    from runner.training.evaluate import evaluate

    loaded = load_adapter(source, settings, any_base=options.any_base, log=arguments.print_note)
    encode_options, cache = EncodeOptions.from_config(config.data), open_token_cache(config.data)
    data = load_sources(
        find_sources(config.data),
        loaded.base.lazy_tokenizer,
        encode_options,
        (options.split,),
        cache,
        valid_fraction=config.data.valid_fraction,
    )
    for note in data.notes:
        arguments.print_note(note)
    rows = getattr(data, options.split)
    assert loaded.adapted is not None
    backend = select_backend(loaded.adapted, config, int(rows.lengths.max()) if len(rows) else None)
    caches = hidden_caches(backend, loaded.base, config, arguments.print_note)
    batches = evaluation_loader(rows, config, caches)
    tested = evaluate(backend, loaded.adapted.params(), batches)
    perplexity = math.exp(min(tested.loss, 700))  # beyond it a float overflows
    document: dict[str, Any] = {
        "run": str(source.run),
        "adapter": str(source.folder),
        "step": source.step,
        "data": config.data.path,
        "split": options.split,
        "rows": batches.row_count,
        "loss": tested.loss,
        "perplexity": perplexity,
        "supervised_tokens": tested.supervised,
        "tokens": tested.tokens,
        "seconds": round(tested.seconds, 3),
    }
    if not options.json:
        print(
            f"{options.split} loss {tested.loss:.4f}, perplexity {perplexity:.3f}: {source.name}, "
            f"{tested.supervised:,} tokens of {batches.row_count:,} rows, {tested.seconds:.1f} s"
        )
    if metric_rows:
        scored = _generate(loaded, data, config, options.split, metric_rows)
        document |= {"metric": config.data.metric, "score": scored.score, "answers": [vars(a) for a in scored.answers]}
        if not options.json:
            _print_samples(scored, config)
    if options.json:
        arguments.print_json(document)
    return 0


def _splits_of(config: Config) -> set[str]:
    """Return the splits that the data has, with the one that is cut off the training rows."""
    splits = {split for source in find_sources(config.data) for split in source.find_files()}
    return splits | ({"valid"} if config.data.valid_fraction is not None else set())


def _metric_rows(rows: int | None, config: Config) -> int:
    """Return how many rows to answer and score: -1 all, 0 none; `rows` is what --rows says."""
    if rows is None:
        return config.data.metric_rows if config.data.metric else 0
    if rows < -1:
        raise ConfigError(f"--rows {rows} is invalid: must be -1 (all), 0 (none) or more.")
    if rows and config.data.metric is None:
        raise ConfigError("--rows needs a metric, and the run's data set has none: data.metric=exact_match or another.")
    return rows


def _generate(
    loaded: LoadedAdapter, data: TokenizedDataset, config: Config, split: str, count: int
) -> GenerationResult:
    from runner.data.formats import EncodeOptions
    from runner.data.metrics import METRICS
    from runner.training.generate import generate

    values = data.first_rows(split, count)
    arguments.print_note(f"answering {len(values)} {split} rows")
    assert config.data.metric is not None
    return generate(
        loaded.base,
        values,
        EncodeOptions.from_config(config.data),
        METRICS[config.data.metric],
        max_tokens=config.data.max_new_tokens,
        log=arguments.print_note,
        cache_probe=config.train.cache_probes,
    )


def _print_samples(scored: GenerationResult, config: Config) -> None:
    from runner.reports import run_summary

    answers = {answer.row: vars(answer) for answer in scored.answers}
    samples = [(None, answers[row]) for row in run_summary.select_samples({}, answers)]
    for line in run_summary.score_lines(str(config.data.metric), len(answers), None, scored.score, samples):
        print(line)
