"""One entry of the token cache: a folder with the four arrays as they are in memory, and a manifest.

An entry is written under another name and renamed once all of it is on the disk; after that nothing in it changes,
so a mapping of it stays what it was, even where its name is gone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from runner.data.encode import EncodedChunk
from runner.data.token_set import SplitStats, TokenSet, fingerprint_head

LAYOUT = 1
"""Raised when the files of an entry change their form."""
COLUMNS = {"offsets": "<i8", "tokens": "<i4", "supervised": "|b1", "lines": "<i8"}
"""The arrays and how they are stored; the first three in this order are what the fingerprint is taken over."""
MANIFEST = "manifest.json"
DRAFT = ".tokens-"
BLOCK = 1 << 20
"""Bytes that share a checksum."""
CHECKED_WHOLE = 256 << 20
"""Bytes of tokens or supervision up to which every block is checked at each start: 0.1 s from memory, up to 1 s from a
disk. Of larger files, `SAMPLED` blocks are checked, others at each start: what damages a file as a whole (a cut, blocks
never written) is found at once, a single wrong block after some starts. Sizes are always checked, and so are offsets
and lines as a whole: 16 bytes a row, and a wrong one would show other tokens as a row's."""
SAMPLED = 64
_LONGEST_MANIFEST = 64 << 20


class CorruptEntry(Exception):
    """An entry that is not what was written, as the end of a sentence."""


class NotCached(Exception):
    """Tokens that could not be written: full disk, read-only folder; the reason."""


def seal(content: dict[str, Any]) -> bytes:
    """A JSON object and, on a line before it, the SHA-256 of its line."""
    body = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body + b"\n"


def unseal(data: bytes) -> dict[str, Any]:
    """The object that `seal` was given. Raises Damaged."""
    head, _, body = data.partition(b"\n")
    body, ended = body[:-1], body[-1:] == b"\n"
    if not ended or hashlib.sha256(body).hexdigest().encode() != head:
        raise CorruptEntry(f"its {MANIFEST} is not one that was written here")
    content: dict[str, Any] = json.loads(body)
    return content


def read(folder: Path, key: str) -> tuple[TokenSet, SplitStats]:
    """The tokens of an entry, mapped, not read.

    Raises:
        Damaged: what is there is not the entry of `key` as it was written. OSError: something is missing or unreadable.
    """
    with _regular(folder / MANIFEST) as file:
        about = unseal(file.read(_LONGEST_MANIFEST))
    if about.get("layout") != LAYOUT or about.get("key") != key:
        raise CorruptEntry("it holds other tokens than its name says")
    counts = SplitStats(**about["counts"])
    with ExitStack() as stack:
        files = {name: stack.enter_context(_regular(folder / name)) for name in COLUMNS}
        for name, file in files.items():
            size, checksums = about["files"][name]["bytes"], about["files"][name]["crc32"]
            if os.fstat(file.fileno()).st_size != size:
                raise CorruptEntry(f"{name} has {os.fstat(file.fileno()).st_size:,} bytes and not {size:,}")
            blocks: Any = range(len(checksums))
            if name in ("tokens", "supervised") and size > CHECKED_WHOLE and len(blocks) > SAMPLED:
                blocks = sorted({0, len(blocks) - 1, *random.SystemRandom().sample(blocks, SAMPLED)})
            for number in blocks:
                file.seek(number * BLOCK)
                if zlib.crc32(file.read(BLOCK)) != checksums[number]:
                    raise CorruptEntry(f"{name} has other bytes than were written")
        tokens = _mapped(files, counts)
    # What the cached property would compute from all of the bytes.
    vars(tokens)["fingerprint"] = about["fingerprint"]
    return tokens, counts


def touch(folder: Path) -> None:
    """Note that the entry was used now."""
    with suppress(OSError):
        os.utime(folder / MANIFEST)


class EntryWriter:
    """An entry that is being written. A context manager: what is not committed is gone at its end.

    Every method raises NotKept where the disk does.
    """

    def __init__(self, root: Path) -> None:
        self.counts = SplitStats()
        self._stack = ExitStack()
        try:
            root.mkdir(parents=True, exist_ok=True)
            clear_drafts(root)
            self.folder = Path(tempfile.mkdtemp(prefix=DRAFT, dir=root))
            self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            _hold(self.folder, self._stack)
            self._files: dict[str, BinaryIO] = {}
            for name in COLUMNS:
                self._files[name] = self._stack.enter_context(_created(self.folder / name))
            self._files["offsets"].write(np.zeros(1, COLUMNS["offsets"]).tobytes())
        except OSError as error:
            self.__exit__()
            raise NotCached(_reason(root, error)) from error

    def __enter__(self) -> EntryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # on a full disk, closing a file fails as writing it did
            self._stack.close()

    def append(self, part: EncodedChunk) -> None:
        """Put `part` behind the others."""
        ends = part.ends + self.counts.tokens
        try:
            self._files["tokens"].write(part.tokens)
            self._files["supervised"].write(part.supervised)
            self._files["offsets"].write(ends.astype(COLUMNS["offsets"], copy=False).tobytes())
            self._files["lines"].write(part.lines.astype(COLUMNS["lines"], copy=False).tobytes())
        except OSError as error:
            raise NotCached(_reason(self.folder.parent, error)) from error
        self.counts += part.counts

    def commit(self, key: str) -> TokenSet:
        """Give the entry its name, and map it. Where another process was faster, that one's stays: it is the same."""
        try:
            about = self._describe(key)
            with open(self.folder / MANIFEST, "xb") as file:
                file.write(seal(about))
                file.flush()
                os.fsync(file.fileno())
            tokens = _mapped(self._files, self.counts)
            _sync_folder(self.folder)
            target = self.folder.parent / key
            try:
                os.rename(self.folder, target)
            except OSError:
                if not target.exists():
                    raise
            _sync_folder(target.parent)
        except OSError as error:
            raise NotCached(_reason(self.folder.parent, error)) from error
        vars(tokens)["fingerprint"] = about["fingerprint"]
        return tokens

    def map(self) -> TokenSet:
        """What was appended, mapped, though it will have no name."""
        try:
            for file in self._files.values():
                file.flush()
            return _mapped(self._files, self.counts)
        except OSError as error:
            raise NotCached(_reason(self.folder.parent, error)) from error

    def _describe(self, key: str) -> dict[str, Any]:
        """The manifest: one pass over the files, which takes the fingerprint along."""
        digest = hashlib.sha256(fingerprint_head(self.counts.tokens, self.counts.rows))
        files: dict[str, Any] = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            checksums, size = [], 0
            for block in _blocks(file):
                checksums.append(zlib.crc32(block))
                size += len(block)
                if name != "lines":
                    digest.update(block)
            files[name] = {"bytes": size, "crc32": checksums}
        return {
            "layout": LAYOUT,
            "key": key,
            "counts": asdict(self.counts),
            "fingerprint": digest.hexdigest(),
            "files": files,
        }


def clear_drafts(root: Path) -> None:
    """Remove what killed processes left half written; a living one holds a lock on its own."""
    for left in root.glob(f"{DRAFT}*"):
        with suppress(OSError), ExitStack() as stack:
            if _age(left) > 60:  # a new one is locked only after it is made
                _hold(left, stack)
                shutil.rmtree(left)


def remove(folder: Path) -> None:
    """Remove an entry, so that at no time half of it can be found; mappings of it stay. Does what it can."""
    with suppress(OSError):
        aside = Path(tempfile.mkdtemp(prefix=DRAFT, dir=folder.parent))
        with suppress(OSError):
            os.rename(folder, aside / "entry")
        shutil.rmtree(aside, ignore_errors=True)


def _age(path: Path) -> float:
    return time.time() - path.lstat().st_mtime


def _regular(path: Path) -> BinaryIO:
    """The regular file `path`, opened; a link or a pipe is damage."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CorruptEntry(f"{path.name} is not a regular file")
    return open(handle, "rb")


def _created(path: Path) -> BinaryIO:
    return open(path, "x+b")


def _mapped(files: dict[str, BinaryIO], counts: SplitStats) -> TokenSet:
    shapes = {"offsets": counts.rows + 1, "tokens": counts.tokens, "supervised": counts.tokens, "lines": counts.rows}
    # A view of the plain kind: indexing a np.memmap makes another np.memmap each time, which costs.
    return TokenSet(
        **{
            name: np.asarray(np.memmap(files[name], kind, mode="r", shape=shapes[name]))
            for name, kind in COLUMNS.items()
        }
    )


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while block := file.read(BLOCK):
        yield block


def _hold(folder: Path, stack: ExitStack) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some file systems know no sync of a folder
            os.fsync(handle)
    finally:
        os.close(handle)


def _reason(folder: Path, error: OSError) -> str:
    return f"{folder}: {error.strerror or error}"
