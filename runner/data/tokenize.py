"""Loading a data set as tokens: locate its files, then tokenize them or map the tokens of an earlier run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.common.disk_cache import DiskCache
from runner.common.errors import DataError
from runner.data.chat_template import writes_date
from runner.data.encode import ChunkWriter, EncodeTask, TokenBuffer, read_chunks, tokenize_in_memory
from runner.data.formats import EncodeOptions, choose_format
from runner.data.jsonl import first_rows, open_data_file, read_jsonl
from runner.data.lazy_tokenizer import LazyTokenizer, resolve_tokenizer
from runner.data.row_errors import RowErrors
from runner.data.source import EXPECTED_FILES, SPLITS, describe_content, find_dataset, find_split_files
from runner.data.text_encoder import TextEncoder
from runner.data.token_cache import TokenCache
from runner.data.token_cache_key import depends_on_date
from runner.data.token_set import SplitStats, TokenSet
from runner.data.tokenize_workers import encode_in_parallel, encode_serially, worker_count


@dataclass(frozen=True)
class TokenizedDataset:
    """The splits of a data set as tokens; a split without a file is empty."""

    train: TokenSet
    valid: TokenSet
    test: TokenSet
    files: dict[str, Path]
    """The file of each split that exists."""
    stats: dict[str, SplitStats]
    notes: list[str] = field(default_factory=list)
    """Lines for the log."""
    dated: bool = False
    """Whether the chat template writes today's date."""

    def first_rows(self, split: str, count: int) -> list[dict[str, Any]]:
        """Return the first `count` rows of a split as read, including those that were left out; all if negative."""
        return first_rows(self.files[split], count) if split in self.files else []


def load_dataset(
    path: str,
    tokenizer: Any | LazyTokenizer,
    options: EncodeOptions,
    splits: Sequence[str] = SPLITS,
    cache: DiskCache | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> TokenizedDataset:
    """Locate, read and tokenize a data set. Of `splits`, train is required; valid and test may be missing.

    With a `cache`, tokens of an earlier run are mapped from disk and new ones are stored there; a lazy tokenizer is
    loaded only if something has to be tokenized. `check_stop` is called regularly while tokenizing and may raise.

    Raises:
        DataError: with the row errors of all files, or where an existing split has no row to train on.
    """
    folder = find_dataset(path)
    files = find_split_files(folder)
    if "train" in splits and "train" not in files:
        raise DataError(f"{folder} has no train.jsonl. {EXPECTED_FILES} {describe_content(folder)}")
    files = {split: file for split, file in files.items() if split in splits}
    errors = RowErrors()
    token_cache = TokenCache(cache, tokenizer, options) if cache else None
    loaded = {split: (TokenBuffer().to_token_set(), SplitStats()) for split in SPLITS}
    for split, file in files.items():

        def tokenize(writer: ChunkWriter, errors: RowErrors, file: Path = file) -> str | None:
            return tokenize_file(file, resolve_tokenizer(tokenizer), options, errors, writer, check_stop)

        loaded[split] = (
            token_cache.load_or_tokenize(file, tokenize, errors)
            if token_cache
            else tokenize_in_memory(tokenize, errors)
        )
    errors.raise_if_any()
    for split, file in files.items():
        _, stats = loaded[split]
        if stats.rows == 0:
            raise DataError(
                f"{file} has no row to train on: {stats.dropped} longer than max_length {options.max_length}, "
                f"{stats.unsupervised} without a supervised token."
            )
    return TokenizedDataset(
        **{split: tokens for split, (tokens, _) in loaded.items()},
        files=files,
        stats={split: stats for split, (_, stats) in loaded.items()},
        notes=token_cache.notes if token_cache else [],
        dated=_is_dated(tokenizer, token_cache, options),
    )


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
    """Write the tokens of `file` to `writer` chunk by chunk, using all cores where the file is large.

    Returns:
        The SHA-256 (hex) of what was read, or None where no line is a row; its lines are then in `errors`.

    Raises:
        DataError: reading the file cannot continue, for example because no format fits its first row.
    """
    line_errors = RowErrors()
    first_row = next(read_jsonl(file, line_errors), None)
    if first_row is None:
        errors.merge(line_errors)
        return None
    task = EncodeTask(
        file, choose_format(first_row, TextEncoder(tokenizer, options.template), options), tokenizer, options
    )
    digest = hashlib.sha256()
    with open_data_file(file) as lines:
        workers = worker_count(os.fstat(lines.fileno()).st_size)
        chunks = read_chunks(lines, digest.update)
        encoded = (
            encode_in_parallel(task, chunks, errors, check_stop, workers)
            if workers
            else encode_serially(task, chunks, errors, check_stop)
        )
        with closing(encoded):
            for chunk in encoded:
                writer.append(chunk)
    return digest.hexdigest()
