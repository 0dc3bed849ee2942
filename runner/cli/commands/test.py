"""`runner test`: loss, perplexity and the data set's own metric of a run or checkpoint on held-out rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.backends.cpu import blas
from runner.cli.commands import COMMANDS, adapter_source, arguments, stored_settings
from runner.common.errors import ConfigError, DataError
from runner.config.schema import Config
from runner.data.source import find_files, resolve

if TYPE_CHECKING:
    from runner.cli.commands.load_adapter import LoadedAdapter
    from runner.data.tokenize import TokenizedDataset
    from runner.training.generate import GenerationResult


def run(argv: list[str]) -> int:
    """Evaluate what `argv` names; the loss is the mean over supervised tokens of all rows of the split.

    Raises:
        RunnerError: a word, the adapter, the base or the data cannot be used.
    """
    parser = arguments.adapter_parser("test", COMMANDS["test"])
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*", default=[], help=arguments.OVERRIDES_HELP)
    parser.add_argument("--split", choices=("test", "valid", "train"), default="test")
    parser.add_argument("--rows", type=int, help="rows to answer and score, -1 for all (default: data.metric_rows)")
    words = arguments.parse_arguments(parser, argv)
    place = adapter_source.find_adapter(Path(words.run), words.checkpoint)
    chosen = stored_settings.read_settings(place.run, words.changes)
    config = chosen.config
    if "train.eval_batches" not in chosen.typed:
        config.train.eval_batches = -1
    wanted = _rows(words.rows, config)
    if words.split not in find_files(resolve(config.data.path)):
        raise DataError(
            f"{config.data.path} has no {words.split}.jsonl. Another split: --split valid. Other data: data.path=…"
        )
    report = blas.load_blas()
    from runner.cli.commands.load_adapter import load_adapted
    from runner.data.from_config import encode_options, token_cache_from
    from runner.data.tokenize import load_dataset
    from runner.training.feeding import fixed_batches, make_forward, make_hidden_caches
    from runner.training.validate import validate

    loaded = load_adapted(place, chosen, any_base=words.any_base, say=arguments.print_note)
    reading, cache = encode_options(config.data), token_cache_from(config.data)
    data = load_dataset(config.data.path, loaded.base.lazy_tokenizer, reading, (words.split,), cache)
    for note in data.notes:
        arguments.print_note(note)
    rows = getattr(data, words.split)
    assert loaded.adapted is not None
    forward = make_forward(loaded.base, loaded.adapted.num_layers, config, report)
    batches = fixed_batches(
        rows, config, make_hidden_caches(forward, loaded.base, config, report, arguments.print_note)
    )
    tested = validate(loaded.base.model, forward, batches)
    evaluated = batches.rows
    perplexity = math.exp(min(tested.loss, 700))
    document: dict[str, Any] = {
        "run": str(place.run),
        "adapter": str(place.folder),
        "step": place.step,
        "data": config.data.path,
        "split": words.split,
        "rows": evaluated,
        "loss": tested.loss,
        "perplexity": perplexity,
        "supervised_tokens": tested.supervised,
        "tokens": tested.tokens,
        "seconds": round(tested.seconds, 3),
    }
    if not words.json:
        print(
            f"{words.split} loss {tested.loss:.4f}, perplexity {perplexity:.3f}: {place.name}, "
            f"{tested.supervised:,} tokens of {evaluated:,} rows, {tested.seconds:.1f} s"
        )
    if wanted:
        made = _answers(loaded, data, config, words.split, wanted)
        document |= {"metric": config.data.metric, "score": made.score, "answers": [vars(a) for a in made.answers]}
        if not words.json:
            _show(made, config)
    if words.json:
        arguments.print_json(document)
    return 0


def _rows(asked: int | None, config: Config) -> int:
    if asked is None:
        return config.data.metric_rows if config.data.metric else 0
    if asked < -1:
        raise ConfigError(f"--rows {asked}: -1 (all), 0 (none) or more.")
    if asked and config.data.metric is None:
        raise ConfigError("--rows needs a metric, and the run's data set has none: data.metric=exact_match or another.")
    return asked


def _answers(
    loaded: LoadedAdapter, data: TokenizedDataset, config: Config, split: str, wanted: int
) -> GenerationResult:
    from runner.data.from_config import encode_options
    from runner.data.metrics import metric_named
    from runner.training.generate import generate

    values = [row.value for row in data.rows[split].first(wanted)]
    arguments.print_note(f"generating {len(values)} {split} rows")
    assert config.data.metric is not None
    return generate(
        loaded.base.model,
        loaded.base.tokenizer,
        values,
        encode_options(config.data),
        metric_named(config.data.metric),
        max_tokens=config.data.max_new_tokens,
    )


def _show(made: GenerationResult, config: Config) -> None:
    from runner.reports import run_summary

    after = {answer.row: vars(answer) for answer in made.answers}
    samples = [(None, after[row]) for row in run_summary.select_samples({}, after)]
    for line in run_summary.score_lines(str(config.data.metric), len(after), None, made.score, samples):
        print(line)
