"""The token cache: tokens of files on disk between runs, found by key, checked, mapped, and evicted by last use.

Nothing that happens to the folder harms a run: a damaged entry is reported and made again, and where nothing can be
written the tokens are made in memory, as without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.common.cache_dir import cache_dir
from runner.common.disk_cache import CacheWriteError, DiskCache
from runner.config.schema import DataConfig
from runner.data.encode import TokenBuffer, TokenizeFile, tokenize_in_memory
from runner.data.formats import EncodeOptions
from runner.data.lazy_tokenizer import LazyTokenizer, resolve_tokenizer
from runner.data.row_errors import RowErrors
from runner.data.split_parts import SplitPart, split_content
from runner.data.token_cache_entry import EntryWriter, read_entry
from runner.data.token_cache_key import (
    cache_key,
    content_hash,
    store_content_hash,
    tokenizer_identity,
    uncacheable_reason,
)
from runner.data.token_set import SplitStats, TokenSet

MIN_FILE_BYTES = 128 << 10
"""Smallest file whose tokens are cached, unless that saves loading the tokenizer. Tokenizing so much takes 0.1 to 0.4
s; a lookup takes 2 ms, and up to 0.1 s more to hash the state of a tokenizer of 150,000 tokens."""
_MAX_ENTRIES = 2000
_MAX_CONTENT_HASHES = 1000


def open_token_cache(config: DataConfig) -> DiskCache | None:
    """Return the disk cache that the data settings name, None where caching is off."""
    if not config.cache:
        return None
    folder = Path(config.cache_folder).expanduser().absolute() if config.cache_folder else cache_dir() / "tokens"
    return DiskCache(folder, int(config.cache_gb * 1e9), _MAX_ENTRIES)


class TokenCache:
    """The cached tokens of one tokenizer and one set of encode options."""

    def __init__(self, disk: DiskCache, tokenizer: Any | LazyTokenizer, options: EncodeOptions) -> None:
        self._disk, self._tokenizer, self._options = disk, tokenizer, options
        self._content_hashes = DiskCache(disk.folder / "files", max_entries=_MAX_CONTENT_HASHES)
        self.identity: str | None = None
        """The tokenizer's, once something was looked up; None where its tokens cannot be cached."""
        self._disabled = False
        self.notes: list[str] = []
        """Lines for the log."""

    def load_or_tokenize(
        self, parts: Sequence[SplitPart], tokenize: TokenizeFile, errors: RowErrors
    ) -> tuple[TokenSet, SplitStats]:
        """Return the cached tokens of the files of a split, or else what `tokenize` makes, which is then cached.

        Raises:
            DataError: a file cannot be read, or `tokenize` raises it.
        """
        files = [part.file for part in parts]
        are_files = all(file.is_file() for file in files)
        if self._disabled or not are_files or sum(file.stat().st_size for file in files) < self._min_file_bytes():
            return tokenize_in_memory(tokenize, errors)
        if self.identity is None:
            self.identity = self._identify_tokenizer()
        if self.identity is None:
            return tokenize_in_memory(tokenize, errors)
        content = split_content(parts, [content_hash(file, self._content_hashes) for file in files])
        key = cache_key(content, self.identity, self._options)
        cached = self._load(key, files[0])
        if cached is not None:
            return cached
        file_errors = RowErrors()
        try:
            result = self._tokenize_to_disk(key, content, tokenize, file_errors)
        except CacheWriteError as error:
            self._disable(f"{error} (data.cache_folder=… sets another folder)")
            file_errors = RowErrors()
            result = tokenize_in_memory(tokenize, file_errors)
        else:
            for file in files:
                store_content_hash(file, self._content_hashes)
        errors.merge(file_errors)
        return result

    def _min_file_bytes(self) -> int:
        saves_loading = isinstance(self._tokenizer, LazyTokenizer) and self._tokenizer.identified_by_files
        return 1 if saves_loading else MIN_FILE_BYTES

    def _identify_tokenizer(self) -> str | None:
        """Return the tokenizer's identity; None, after disabling the cache, where its tokens cannot be cached."""
        lazy = self._tokenizer if isinstance(self._tokenizer, LazyTokenizer) else None
        if lazy and (identity := lazy.cached_identity(self._options)):
            return identity
        tokenizer = resolve_tokenizer(self._tokenizer)
        if reason := uncacheable_reason(tokenizer, self._options):
            self._disable(reason)
            return None
        identity = tokenizer_identity(tokenizer)
        if lazy:
            lazy.store_identity(self._options, identity)
        return identity

    def _disable(self, reason: str) -> None:
        self._disabled = True
        self._note_not_cached(reason)

    def _note_not_cached(self, reason: str) -> None:
        self.notes.append(f"data   tokens are not cached: {reason}")

    def _load(self, key: str, file: Path) -> tuple[TokenSet, SplitStats] | None:
        folder = self._disk.folder / key
        if not folder.is_dir() or folder.is_symlink():
            return None
        try:
            cached = read_entry(folder, key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if folder.is_dir():  # else another run has just evicted it
                reason = (error.strerror if isinstance(error, OSError) else None) or error
                self.notes.append(
                    f"data   the cached tokens in {folder} are damaged ({reason}): tokenizing {file} again"
                )
                self._disk.remove(key)
            return None
        self._disk.touch(key)
        return cached

    def _tokenize_to_disk(
        self, key: str, content: str, tokenize: TokenizeFile, errors: RowErrors
    ) -> tuple[TokenSet, SplitStats]:
        with EntryWriter(self._disk) as writer:
            tokenized_content = tokenize(writer, errors)
            if errors.count or not writer.stats.rows:
                return TokenBuffer().to_token_set(), writer.stats  # refused by the caller; an empty file has no mapping
            if tokenized_content != content:
                self._note_not_cached("the file changed while it was read")
                return writer.map(), writer.stats
            tokens = writer.commit(key)
        if key in self._disk.evict(newest=key):
            assert self._disk.max_bytes is not None
            self._note_not_cached(f"they exceed data.cache_gb={self._disk.max_bytes / 1e9:g}")
        return tokens, writer.stats
