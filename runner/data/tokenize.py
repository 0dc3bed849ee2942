"""A data set as tokens: its files found, and read and tokenised, or taken from where an earlier run left them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from runner.common.errors import DataError
from runner.data.chat_spans import TextEncoder
from runner.data.encode import Columns, InMemoryColumns, encode_in_memory, encode_rows, read_chunks
from runner.data.formats import EncodeOptions, choose_format
from runner.data.jsonl import JsonlRow, LazyRows, open_data_file, read_jsonl
from runner.data.lazy_tokenizer import LazyTokenizer, resolve_tokenizer
from runner.data.row_errors import RowErrors
from runner.data.source import EXPECTED, SPLITS, find_files, listing, resolve
from runner.data.token_cache import TokenCache
from runner.data.token_set import SplitStats, TokenSet
from runner.data.tokenize_workers import Task, encode_apart, encode_here, workers_for

_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class TokenizedDataset:
    """The splits of a data set as tokens; a split that there is no file for is empty."""

    train: TokenSet
    valid: TokenSet
    test: TokenSet
    rows: dict[str, LazyRows]
    """The raw rows of each split's file, all of them, read at the first access."""
    counts: dict[str, SplitStats]
    where: Path
    """The folder the files were found for."""
    notes: list[str] = field(default_factory=list)
    """Lines worth saying."""


def tokenize_rows(
    rows: Iterable[JsonlRow], tokenizer: Any, reading: EncodeOptions, bad: RowErrors | None = None
) -> tuple[TokenSet, SplitStats]:
    """The rows as tokens, in their order, and what became of them. Memory grows with tokens, 5 bytes each.

    `tokenizer` is mlx-lm's TokenizerWrapper or a transformers tokenizer. Rows that cannot be used go to
    `bad`; without it, they raise once all rows are read.

    Raises:
        DataError: bad rows where `bad` is None, or no format for the first row.
    """
    collected = RowErrors() if bad is None else bad
    encoder, into = TextEncoder(tokenizer), InMemoryColumns()
    rows = iter(rows)
    chosen = None
    for row in rows:
        chosen = chosen or choose_format(row, encoder, reading)
        few = chain([row], islice(rows, _ROWS_AT_ONCE - 1))
        into.append(encode_rows(few, chosen, encoder, reading, collected))
    if bad is None:
        collected.raise_if_any()
    return into.tokens(), into.counts


def load_dataset(
    path: str,
    tokenizer: Any | LazyTokenizer,
    reading: EncodeOptions,
    splits: Sequence[str] = SPLITS,
    cache: TokenCache | None = None,
    each: Callable[[], None] = lambda: None,
) -> TokenizedDataset:
    """Resolve, read and tokenise a data set. Of `splits`, train has to be there, valid and test need not.

    With a `cache`, tokens that an earlier run left there are mapped instead, and others are left there; a tokenizer for
    later is then not loaded. `each` is called now and then while rows are tokenised, and may raise.

    Raises:
        DataError: with all bad rows of all files, or when a split that is there has no row to learn from.
    """
    where = resolve(path)
    files = find_files(where)
    if "train" in splits and "train" not in files:
        raise DataError(f"{where} has no train.jsonl. {EXPECTED} {listing(where)}")
    files = {split: file for split, file in files.items() if split in splits}
    bad = RowErrors()
    store = cache.opened(tokenizer, reading) if cache else None
    read = {}
    for split, file in files.items():

        def fill(into: Columns, bad: RowErrors, file: Path = file) -> str:
            return tokenize_file(file, resolve_tokenizer(tokenizer), reading, bad, into, each)

        read[split] = store.tokens_of(file, fill, bad) if store else encode_in_memory(fill, bad)
    bad.raise_if_any()
    for split, (_, counts) in read.items():
        if counts.rows == 0:
            raise DataError(
                f"{files[split]} has no row to learn from: {counts.dropped} longer than max_length "
                f"{reading.max_length}, {counts.nothing_to_learn} without a supervised token."
            )
    sets = {split: read[split] if split in read else (InMemoryColumns().tokens(), SplitStats()) for split in SPLITS}
    return TokenizedDataset(
        **{split: tokens for split, (tokens, _) in sets.items()},
        rows={split: LazyRows(files.get(split)) for split in SPLITS},
        counts={split: counts for split, (_, counts) in sets.items()},
        where=where,
        notes=store.notes if store else [],
    )


def tokenize_file(
    file: Path, tokenizer: Any, reading: EncodeOptions, bad: RowErrors, into: Columns, each: Callable[[], None]
) -> str:
    """Put the tokens of `file` into `into` a piece at a time, on all cores where the file is large.

    Returns the SHA-256 (hex) of what was read.

    Raises:
        DataError: what ends the reading of a file, such as no format for its first row.
    """
    digest = hashlib.sha256()
    with open_data_file(file) as lines:
        count = workers_for(os.fstat(lines.fileno()).st_size)
        # Other processes have to be told the format; one row more is read for it.
        first = next(read_jsonl(file, RowErrors()), None) if count else None
        task = Task(file, choose_format(first, TextEncoder(tokenizer), reading) if first else None, tokenizer, reading)
        pieces = read_chunks(lines, digest.update)
        parts = encode_apart(task, pieces, bad, each, count) if count else encode_here(task, pieces, bad, each)
        with closing(parts):
            for part in parts:
                into.append(part)
    return digest.hexdigest()
