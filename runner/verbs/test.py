"""`runner test`: loss, perplexity and the data set's own metric of a run or checkpoint on held-out rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import blas
from runner.config import Config
from runner.data.source import find_files, resolve
from runner.errors import ConfigError, DataError
from runner.verbs import VERBS, asking, places, settings

if TYPE_CHECKING:
    from runner.data.tokens import DataSet
    from runner.training.generation import Generation
    from runner.verbs.loading import Loaded


def run(argv: list[str]) -> int:
    """Evaluate what `argv` names; the loss is the mean over supervised tokens of all rows of the split.

    Raises:
        RunnerError: a word, the adapter, the base or the data cannot be used.
    """
    parser = asking.parser("test", VERBS["test"])
    parser.add_argument("changes", metavar="KEY=VALUE", nargs="*", default=[], help=asking.CHANGES)
    parser.add_argument("--split", choices=("test", "valid", "train"), default="test")
    parser.add_argument("--rows", type=int, help="rows to answer and score, -1 for all (default: data.metric_rows)")
    words = asking.parse(parser, argv)
    place = places.find(Path(words.run), words.checkpoint)
    chosen = settings.read(place.run, words.changes)
    config = chosen.config
    if "train.eval_batches" not in chosen.typed:
        config.train.eval_batches = -1
    wanted = _rows(words.rows, config)
    if words.split not in find_files(resolve(config.data.path)):
        raise DataError(
            f"{config.data.path} has no {words.split}.jsonl. Another split: --split valid. Other data: data.path=…"
        )
    report = blas.prepare()
    from runner.data.reading import cache_of, reading_of
    from runner.data.tokens import load_splits
    from runner.training.evaluation import evaluate
    from runner.training.feeding import fixed_batches, make_forward, make_trunks
    from runner.verbs.loading import load_adapted

    loaded = load_adapted(place, chosen, any_base=words.any_base, say=asking.say)
    reading, cache = reading_of(config.data), cache_of(config.data)
    data = load_splits(config.data.path, loaded.base.tokens, reading, (words.split,), cache)
    for note in data.notes:
        asking.say(note)
    rows = getattr(data, words.split)
    assert loaded.adapted is not None
    forward = make_forward(loaded.base, loaded.adapted.num_layers, config, report)
    batches = fixed_batches(rows, config, make_trunks(forward, loaded.base, config, report, asking.say))
    tested = evaluate(loaded.base.model, forward, batches)
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
        asking.print_json(document)
    return 0


def _rows(asked: int | None, config: Config) -> int:
    if asked is None:
        return config.data.metric_rows if config.data.metric else 0
    if asked < -1:
        raise ConfigError(f"--rows {asked}: -1 (all), 0 (none) or more.")
    if asked and config.data.metric is None:
        raise ConfigError("--rows needs a metric, and the run's data set has none: data.metric=exact_match or another.")
    return asked


def _answers(loaded: Loaded, data: DataSet, config: Config, split: str, wanted: int) -> Generation:
    from runner.data.metrics import metric_named
    from runner.data.reading import reading_of
    from runner.training.generation import generate

    values = [row.value for row in data.rows[split].first(wanted)]
    asking.say(f"generating {len(values)} {split} rows")
    assert config.data.metric is not None
    return generate(
        loaded.base.model,
        loaded.base.tokenizer,
        values,
        reading_of(config.data),
        metric_named(config.data.metric),
        max_tokens=config.data.max_new_tokens,
    )


def _show(made: Generation, config: Config) -> None:
    from runner.reports import summary

    after = {answer.row: vars(answer) for answer in made.answers}
    samples = [(None, after[row]) for row in summary.pick_samples({}, after)]
    for line in summary.before_and_after(str(config.data.metric), len(after), None, made.score, samples):
        print(line)
