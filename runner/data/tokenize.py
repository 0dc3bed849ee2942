"""Loading a data set as tokens: locate its files, then tokenize them or map the tokens of an earlier run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.disk_cache import DiskCache
from runner.common.errors import DataError
from runner.config.schema import Config
from runner.data.chat_template import writes_date
from runner.data.encode import Chunk, ChunkWriter, EncodePart, EncodeTask, TokenBuffer, tokenize_in_memory
from runner.data.formats import FORMATS, EncodeOptions, choose_format, format_name, format_note
from runner.data.holdout import Holdout, find_threshold
from runner.data.jsonl import JsonlRow
from runner.data.lazy_tokenizer import LazyTokenizer, resolve_tokenizer
from runner.data.mixture import Mixture
from runner.data.preferences import as_examples
from runner.data.readers import ChunkReader, read_rows
from runner.data.row_errors import RowErrors
from runner.data.source import EXPECTED_FILES, SPLITS, Source, describe_content, find_sources
from runner.data.split_parts import SplitPart, split_content
from runner.data.text_encoder import TextEncoder
from runner.data.token_cache import TokenCache, open_token_cache
from runner.data.token_cache_key import depends_on_date
from runner.data.token_set import SplitStats, TokenSet, part_numbers, row_location, split_location
from runner.data.tokenize_workers import encode_in_parallel, encode_serially, worker_count


@dataclass(frozen=True)
class TokenizedDataset:
    """The splits of a data set as tokens; a split without a file is empty."""

    train: TokenSet
    valid: TokenSet
    test: TokenSet
    parts: dict[str, tuple[SplitPart, ...]]
    """The files of each split that exists."""
    stats: dict[str, SplitStats]
    tokenizer: Any
    """The tokenizer, or the LazyTokenizer that loads it."""
    options: EncodeOptions
    """The options of all sources; a source's own may have another format and other keys."""
    notes: list[str] = field(default_factory=list)
    """Lines for the log."""
    dated: bool = False
    """Whether the chat template writes today's date."""
    mixture: Mixture | None = None
    """The shares of the sources in an epoch; None where every row comes once."""

    def first_rows(self, split: str, count: int) -> list[dict[str, Any]]:
        """Return the first `count` rows of a split, including those that were left out; all if negative.

        They are texts, prompts and completions, or messages, in the fields that `options.keys` names.
        """
        return list(islice(self._standard_rows(split), count if count >= 0 else None))

    def rows_by_location(self, split: str) -> dict[int, dict[str, Any]]:
        """Return the rows of a split as `first_rows` does, by their `TokenSet.lines`."""
        return dict(self._located_rows(split))

    def decode(self, tokens: Any) -> str:
        """Return the text of `tokens`, special tokens included."""
        return str(resolve_tokenizer(self.tokenizer).decode([int(token) for token in tokens]))

    def locate(self, split: str, row: int) -> tuple[Path, int]:
        """Return the file and the line (or the number of the row) that row `row` of a split comes from."""
        part, line = split_location(int(getattr(self, split).lines[row]))
        return self.parts[split][part].file, line

    def _standard_rows(self, split: str) -> Iterator[dict[str, Any]]:
        return (row for _, row in self._located_rows(split))

    def _located_rows(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, part in enumerate(self.parts.get(split, ())):
            row_format = None
            for row in read_rows(part.file):
                if row_format is None:
                    row_format = FORMATS[format_name(row, part.options)]
                    encoder = TextEncoder(resolve_tokenizer(self.tokenizer), self.options.template)
                if part.holdout is None or part.holdout.selects(row.value):
                    standard = row_format.standardize(row.value, part.options.keys, part.options.renders(encoder))
                    yield row_location(number, row.line), _with_keys(standard, part.options, self.options)


def load_dataset(
    path: str,
    tokenizer: Any | LazyTokenizer,
    options: EncodeOptions,
    splits: Sequence[str] = SPLITS,
    cache: DiskCache | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> TokenizedDataset:
    """Load the data set that `path` names; see `load_sources`."""
    return load_sources([Source(path=path, options=options)], tokenizer, options, splits, cache, check_stop)


def load_data(
    config: Config,
    tokenizer: Any | LazyTokenizer,
    splits: Sequence[str] = SPLITS,
    check_stop: Callable[[], None] = lambda: None,
) -> TokenizedDataset:
    """Locate, read and tokenize the configured data as training does; see `load_sources`."""
    return load_sources(
        find_sources(config.data, config.method.name),
        tokenizer,
        EncodeOptions.from_config(config.data, config.method.name),
        splits,
        open_token_cache(config.data),
        check_stop,
        config.data.valid_fraction,
    )


def load_sources(
    sources: Sequence[Source],
    tokenizer: Any | LazyTokenizer,
    options: EncodeOptions,
    splits: Sequence[str] = SPLITS,
    cache: DiskCache | None = None,
    check_stop: Callable[[], None] = lambda: None,
    valid_fraction: float | None = None,
) -> TokenizedDataset:
    """Locate, read and tokenize data sets as one. Of `splits`, train is required; valid and test may be missing.

    With a `cache`, tokens of an earlier run are mapped from disk and new ones are stored there; a lazy tokenizer is
    loaded only if something has to be tokenized. `check_stop` is called regularly while tokenizing and may raise.
    `valid_fraction` is the share of the training rows that becomes the validation split of a source without one.

    Raises:
        DataError: with the row errors of all files, or where an existing split has no row to train on.
    """
    parts, notes = _find_parts(sources, splits, valid_fraction)
    errors = RowErrors()
    token_cache = TokenCache(cache, tokenizer, options) if cache else None
    loaded = {split: (TokenBuffer().to_token_set(), SplitStats()) for split in SPLITS}
    for split, split_parts in parts.items():

        def tokenize(writer: ChunkWriter, errors: RowErrors, parts: tuple[SplitPart, ...] = split_parts) -> str | None:
            return tokenize_parts(parts, resolve_tokenizer(tokenizer), errors, writer, check_stop)

        loaded[split] = (
            token_cache.load_or_tokenize(split_parts, tokenize, errors)
            if token_cache
            else tokenize_in_memory(tokenize, errors)
        )
    errors.raise_if_any()
    for split, split_parts in parts.items():
        _require_rows(loaded[split][1], split_parts, options)
    examples = {split: as_examples(tokens, options) for split, (tokens, _) in loaded.items()}
    mixture = _mixture(sources, parts.get("train", ()), examples["train"])
    return TokenizedDataset(
        **examples,
        parts=parts,
        stats={split: stats for split, (_, stats) in loaded.items()},
        tokenizer=tokenizer,
        options=options,
        notes=[
            *notes,
            *_format_notes(sources, parts.get("train", ())),
            *_unused_sources(sources, mixture),
            *(token_cache.notes if token_cache else []),
        ],
        dated=_is_dated(tokenizer, token_cache, options),
        mixture=mixture,
    )


def _find_parts(
    sources: Sequence[Source], splits: Sequence[str], valid_fraction: float | None
) -> tuple[dict[str, tuple[SplitPart, ...]], list[str]]:
    """Return the files of each of `splits`, those of all sources one after the other, and notes about them."""
    parts: dict[str, list[SplitPart]] = {split: [] for split in SPLITS}
    notes = []
    for number, source in enumerate(sources):
        files = source.find_files()
        if "train" in splits and "train" not in files:
            folder = next(iter(files.values()))[0].parent
            raise DataError(f"{source.path} has no train.jsonl. {EXPECTED_FILES} {describe_content(folder)}")
        cut: dict[str, Holdout | None] = dict.fromkeys(files)
        if valid_fraction is not None and "valid" not in files and "train" in files:
            rows = (row.value for file in files["train"] for row in read_rows(file, RowErrors()))
            threshold = find_threshold(rows, valid_fraction)
            files = {**files, "valid": files["train"]}
            cut |= {"train": Holdout(threshold, valid=False), "valid": Holdout(threshold, valid=True)}
            notes.append(
                f"data   {source.path} has no validation split: {valid_fraction:.3g} of its training rows are cut off "
                "for it (data.valid_fraction)"
            )
        for split, split_files in files.items():
            parts[split] += [SplitPart(file, source.options, number, cut[split]) for file in split_files]
    return {split: tuple(found) for split, found in parts.items() if found and split in splits}, notes


def _format_notes(sources: Sequence[Source], train: Sequence[SplitPart]) -> list[str]:
    """Return what the log says about the format of each source: by the first row of its training rows."""
    notes = []
    for number, source in enumerate(sources):
        file = next((part.file for part in train if part.source == number), None)
        first = next(read_rows(file, RowErrors()), None) if file else None
        note = format_note(first, format_name(first, source.options), source.options) if first else None
        notes += [f"data   {file}: {note}"] if note else []
    return notes


def _require_rows(stats: SplitStats, parts: Sequence[SplitPart], options: EncodeOptions) -> None:
    if stats.rows:
        return
    reasons = [
        f"{count} {outcome}"
        for count, outcome in (
            (stats.dropped, f"longer than max_length {options.max_length}"),
            (stats.prompt_too_long, f"with a prompt that alone reaches max_length {options.max_length}"),
            (stats.unsupervised, "without a supervised token"),
        )
        if count
    ]
    hint = " A larger data.max_length keeps more of each row." if stats.dropped or stats.prompt_too_long else ""
    if not reasons and any(part.holdout for part in parts):
        reasons, hint = ["too few different rows to cut validation rows off"], " Set data.valid_fraction=null."
    raise DataError(f"{parts[0].file} has no row to train on: {', '.join(reasons) or 'it is empty'}.{hint}")


def _mixture(sources: Sequence[Source], parts: Sequence[SplitPart], train: TokenSet) -> Mixture | None:
    if len(sources) == 1 or not len(train):
        return None
    source_of_part = np.array([part.source for part in parts])
    found = source_of_part[part_numbers(train.lines[:: train.rows_per_example])]
    sizes = np.bincount(found, minlength=len(sources))
    return Mixture.from_weights([int(size) for size in sizes], [source.weight for source in sources])


def _unused_sources(sources: Sequence[Source], mixture: Mixture | None) -> list[str]:
    """Return a line for each source of a mix of which no row is in an epoch."""
    if mixture is None:
        return []
    return [
        f"data   {source.path} has no row in an epoch: "
        f"{'its weight is too small' if size else 'none of its rows can be trained on'} (data.mix)"
        for source, size, count in zip(sources, mixture.sizes, mixture.counts, strict=True)
        if not size or not count
    ]


def _with_keys(row: dict[str, Any], own: EncodeOptions, common: EncodeOptions) -> dict[str, Any]:
    """Return the row with its fields named as the common keys say."""
    renamed = dict(row)
    for name in ("text", "prompt", "completion", "messages"):
        source_key, key = getattr(own.keys, name), getattr(common.keys, name)
        if source_key != key and source_key in row:
            renamed[key] = row[source_key]
    return renamed


def _is_dated(tokenizer: Any | LazyTokenizer, token_cache: TokenCache | None, options: EncodeOptions) -> bool:
    """Return whether the chat template in use writes today's date, without loading a tokenizer just for that."""
    if token_cache and token_cache.identity:
        return depends_on_date(token_cache.identity, options)
    template = options.template.text or getattr(resolve_tokenizer(tokenizer), "chat_template", None)
    return writes_date(str(template))


def tokenize_file(
    file: Path,
    tokenizer: Any,
    options: EncodeOptions,
    errors: RowErrors,
    writer: ChunkWriter,
    check_stop: Callable[[], None],
) -> str | None:
    """Write the tokens of one file to `writer`; see `tokenize_parts`."""
    return tokenize_parts([SplitPart(file, options)], tokenizer, errors, writer, check_stop)


def tokenize_parts(
    parts: Sequence[SplitPart],
    tokenizer: Any,
    errors: RowErrors,
    writer: ChunkWriter,
    check_stop: Callable[[], None],
) -> str | None:
    """Write the tokens of the files of a split to `writer` chunk by chunk, using all cores where they are large.

    Returns:
        The `split_content` of what was read, or None where a file has no row; its lines are then in `errors`.

    Raises:
        DataError: reading a file cannot continue, for example because no format fits its first row.
    """
    encoder = TextEncoder(tokenizer, parts[0].options.template)
    encode_parts = []
    for part in parts:
        line_errors = RowErrors()
        first_row: JsonlRow | None = next(read_rows(part.file, line_errors), None)
        if first_row is None:
            errors.merge(line_errors)
            return None
        row_format = choose_format(first_row, encoder, part.options)
        encode_parts.append(EncodePart(part.file, row_format, part.options, part.holdout))
    task = EncodeTask(tuple(encode_parts), tokenizer)
    contents: list[str] = []

    def chunks() -> Iterator[Chunk]:
        for number, part in enumerate(parts):
            reader = ChunkReader(part.file, number, errors)
            yield from reader
            contents.append(reader.content())

    workers = worker_count(sum(part.file.stat().st_size for part in parts))
    encoded = (
        encode_in_parallel(task, chunks(), errors, check_stop, workers)
        if workers
        else encode_serially(task, chunks(), errors, check_stop)
    )
    with closing(encoded):
        for chunk in encoded:
            writer.append(chunk)
    return split_content(parts, contents)
