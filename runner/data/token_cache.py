"""Tokens kept on disk between runs: found by key, checked, mapped; the least recently used give way to new ones.

Nothing that happens to the folder harms a run: an entry that is damaged, cut or of another is said and made anew, and
where nothing can be written the tokens are made in memory, as without a cache.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.data import token_cache_entry
from runner.data.encode import Fill, InMemoryColumns, encode_in_memory
from runner.data.formats import EncodeOptions
from runner.data.lazy_tokenizer import LazyTokenizer, resolve_tokenizer
from runner.data.row_errors import RowErrors
from runner.data.token_cache_entry import MANIFEST, CorruptEntry, EntryWriter, NotCached
from runner.data.token_cache_key import (
    cache_key,
    content_hash,
    note_content_hash,
    tokenizer_identity,
    uncacheable_reason,
)
from runner.data.token_set import SplitStats, TokenSet

SMALLEST = 128 << 10
"""Bytes of JSONL from which a file's tokens are kept, where they do not save loading the tokenizer. Making so many
takes 0.1 to 0.4 s. Finding them takes 2 ms, and up to 0.1 s more to hash the state of a tokenizer of 150,000 tokens:
with less to gain, the folder stays tidy."""
MOST_ENTRIES = 2000
"""Files whose tokens are kept, however small."""
_ENTRY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TokenCache:
    """A folder of tokens and the most bytes that it may hold after a run has added to it."""

    folder: Path
    limit: int

    def opened(self, tokenizer: Any | LazyTokenizer, reading: EncodeOptions) -> Store:
        """The cache for one tokenizer and one way to read rows."""
        return Store(self, tokenizer, reading)


@dataclass
class Store:
    """The tokens of one tokenizer and one way to read rows."""

    cache: TokenCache
    tokenizer: Any | LazyTokenizer
    reading: EncodeOptions
    notes: list[str] = field(default_factory=list)
    """Lines worth saying."""
    _identity: str | None = None
    _off: bool = False

    def tokens_of(self, file: Path, fill: Fill, bad: RowErrors) -> tuple[TokenSet, SplitStats]:
        """The tokens of `file`: those that are kept, or what `fill` makes, which is then kept.

        Raises:
            DataError: the file cannot be read, or what `fill` raises.
        """
        if self._off or not file.is_file() or file.stat().st_size < self._smallest():
            return encode_in_memory(fill, bad)
        if self._identity is None:
            self._identity = self._identify()
        if self._identity is None:
            return encode_in_memory(fill, bad)
        content = content_hash(file, self.cache.folder / "files")
        key = cache_key(content, self._identity, self.reading)
        found = self._find(key, file)
        if found is not None:
            return found
        own = RowErrors()
        try:
            made = self._make(key, content, fill, own)
        except NotCached as reason:
            self._leave(f"tokens are not kept on disk: {reason} (data.cache_folder=… names another folder)")
            own = RowErrors()
            made = encode_in_memory(fill, own)
        else:
            note_content_hash(file, self.cache.folder / "files")
        bad.merge(own)
        return made

    def _smallest(self) -> int:
        return 1 if isinstance(self.tokenizer, LazyTokenizer) and self.tokenizer.known_by_files else SMALLEST

    def _identify(self) -> str | None:
        """What the tokenizer is known by; None, with a note, where its tokens cannot be kept."""
        later = self.tokenizer if isinstance(self.tokenizer, LazyTokenizer) else None
        if later and (known := later.known(self.reading)):
            return known
        tokenizer = resolve_tokenizer(self.tokenizer)
        if reason := uncacheable_reason(tokenizer, self.reading):
            self._leave(f"tokens are not kept on disk: {reason}")
            return None
        found = tokenizer_identity(tokenizer)
        if later:
            later.keep(self.reading, found)
        return found

    def _leave(self, note: str) -> None:
        self._off = True
        self.notes.append(f"data   {note}")

    def _find(self, key: str, file: Path) -> tuple[TokenSet, SplitStats] | None:
        folder = self.cache.folder / key
        if not folder.is_dir() or folder.is_symlink():
            return None
        try:
            found = token_cache_entry.read(folder, key)
        except (OSError, CorruptEntry, ValueError, KeyError, TypeError) as error:
            if folder.is_dir():  # else another run has just removed it to make room
                reason = (error.strerror if isinstance(error, OSError) else None) or error
                self.notes.append(
                    f"data   the tokens kept in {folder} are damaged ({reason}): {file} is tokenised again"
                )
                token_cache_entry.remove(folder)
            return None
        token_cache_entry.touch(folder)
        return found

    def _make(self, key: str, content: str, fill: Fill, bad: RowErrors) -> tuple[TokenSet, SplitStats]:
        with EntryWriter(self.cache.folder) as draft:
            read = fill(draft, bad)
            if bad.count or not draft.counts.rows:
                return InMemoryColumns().tokens(), draft.counts  # refused by who asked; an empty file has no mapping
            if read != content:
                self.notes.append("data   tokens are not kept on disk: the file was changed while it was read")
                return draft.map(), draft.counts
            tokens = draft.commit(key)
        self._make_room(key)
        return tokens, draft.counts

    def _make_room(self, newest: str) -> None:
        """Remove the entries that were not used for longest, until the others are within the limits.

        One that a process has mapped stays readable to it: the disk's blocks are free once no mapping is left.
        """
        entries = []
        for folder in self.cache.folder.iterdir() if self.cache.folder.is_dir() else ():
            if _ENTRY.fullmatch(folder.name):
                used = 0.0 if folder.name != newest else float("inf")
                with suppress(OSError):
                    used = max(used, (folder / MANIFEST).stat().st_mtime)
                entries.append((used, folder, _size(folder)))
        left = sum(size for _, _, size in entries)
        for number, (_, folder, size) in enumerate(sorted(entries)):
            if left <= self.cache.limit and len(entries) - number <= MOST_ENTRIES:
                return
            if folder.name == newest:
                self.notes.append(
                    f"data   tokens are not kept on disk: {size / 1e9:.2f} GB, over data.cache_gb="
                    f"{self.cache.limit / 1e9:g}"
                )
            token_cache_entry.remove(folder)
            left -= size


def _size(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        for file in folder.iterdir():
            total += file.lstat().st_size
    return total
