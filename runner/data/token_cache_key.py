"""What decides the tokens of a file, as a key: its content, the tokenizer, how rows are read, and the code for it.

**A file's content** is known by its SHA-256. A file of up to `ALWAYS_READ` bytes is hashed at each start. A larger one
is hashed once, and its hash is noted beside the size, inode, device and the times of the last change of content
(mtime) and of anything (ctime) that it had then; where all of these are still the same, the note is believed. So that
an edit of the same size in the same tick of the clock cannot pass, a note is made only of a file whose both times lie
`SETTLED` back when its hashing begins: an edit after that gets other times. (A program may set the mtime back after
an edit, but not the ctime.) What is tokenised is hashed once more while it is read, and kept only under its own hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from runner.common.errors import DataError
from runner.data.formats import EncodeOptions
from runner.data.jsonl import open_data_file
from runner.data.token_cache_entry import CorruptEntry, seal, unseal

ALWAYS_READ = 16 << 20
"""Bytes; 20 ms."""
SETTLED = 3.0
"""Seconds; FAT keeps times to 2 s, every other file system more exactly."""
PACKAGES = ("tokenizers", "transformers", "mlx-lm", "jinja2")
CODE = ("jsonl.py", "formats.py", "chat_spans.py", "encode.py", "token_set.py")
"""Files of this package that decide tokens. Their text is part of the key: a version number would have to be raised by
hand with every change, and a change that forgot it would train on what the former code made."""
_UNSTEADY = re.compile(r"\w*strftime\w*|\b(?:date)?(?:time_)?now(?=\s*\()|\blipsum\b|(?:\||\bmap\()[\s'\"]*random\b")
"""What a chat template may call that gives another text another time: the date, and Jinja's chance."""
_LONGEST_NOTE = 1 << 16


def uncacheable_reason(tokenizer: Any, reading: EncodeOptions) -> str | None:
    """Why tokens of this tokenizer cannot be kept, or None where they can."""
    inner = _inner(tokenizer)
    # Of a slow tokenizer, or one that came with the model, code decides the tokens: it cannot be written down.
    if not (hasattr(inner, "backend_tokenizer") and type(inner).__module__.startswith(("transformers.", "mlx_lm."))):
        return "the tokenizer is a program of its own"
    if reading.format == "text" or not reading.chat_template:
        return None
    if getattr(tokenizer, "_chat_template", None) is not None:
        return "the model's chat template is a program of its own"
    found = _UNSTEADY.search(str(getattr(inner, "chat_template", None)))
    return f"the model's chat template uses {found[0]}, so its text differs from day to day" if found else None


def cache_key(content: str, tokenizer: str, reading: EncodeOptions) -> str:
    """The key (SHA-256, hex) of the tokens of a file with this `content`, by a tokenizer with this identity."""
    parts = {"content": content, "tokenizer": tokenizer, "reading": asdict(reading), "code": code_identity()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def tokenizer_identity(tokenizer: Any) -> str:
    """SHA-256 (hex) over all that decides a fast tokenizer's tokens and the texts of its chat template."""
    inner = _inner(tokenizer)
    parts = {
        "classes": [f"{type(each).__module__}.{type(each).__qualname__}" for each in (tokenizer, inner)],
        "state": inner.backend_tokenizer.to_str(),
        "special": [inner.special_tokens_map, inner.all_special_ids, inner.eos_token_id, inner.get_added_vocab()],
        "template": [inner.chat_template, getattr(tokenizer, "_thinking_kwarg", None)],
        "thinking": getattr(tokenizer, "has_thinking", None),
        "has_chat_template": getattr(tokenizer, "has_chat_template", None),
        "settings": {name: vars(inner).get(name) for name in _SETTINGS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


_SETTINGS = (
    "_add_bos_token",
    "_add_eos_token",
    "add_prefix_space",
    "split_special_tokens",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
)


@cache
def code_identity() -> str:
    """SHA-256 (hex) over the code that makes tokens, here and in the packages that it calls."""
    digest = hashlib.sha256(f"Python {sys.version_info[:2]}\n".encode())
    for name in PACKAGES:
        digest.update(f"{name} {version(name)}\n".encode())
    for name in CODE:
        digest.update(hashlib.sha256((Path(__file__).parent / name).read_bytes()).digest())
    return digest.hexdigest()


def content_hash(file: Path, notes: Path) -> str:
    """The SHA-256 (hex) of the content of `file`; that of a large one may come from its note in the folder `notes`.

    Raises:
        DataError: it cannot be read.
    """
    with open_data_file(file) as source:
        found = os.fstat(source.fileno())
        path = str(file.resolve())
        stated: dict[str, Any] = {
            "path": path,
            "size": found.st_size,
            "mtime_ns": found.st_mtime_ns,
            "ctime_ns": found.st_ctime_ns,
            "inode": found.st_ino,
            "device": found.st_dev,
        }
        if found.st_size <= ALWAYS_READ:
            return hashlib.file_digest(source, "sha256").hexdigest()
        note = notes / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
        with suppress(OSError, CorruptEntry, ValueError, KeyError, TypeError):
            with open(note, "rb") as known:
                told = unseal(known.read(_LONGEST_NOTE))
            content = told.pop("sha256")
            if told == stated and isinstance(content, str):
                return content
        settled = _is_settled(found)
        content = hashlib.file_digest(source, "sha256").hexdigest()
    if settled:
        with suppress(OSError):
            _write(note, seal({**stated, "sha256": content}))
    return content


def note_content_hash(file: Path, notes: Path) -> None:
    """Have the hash of a large `file` noted, if it was too new for that when `content_of` hashed it and is not now.

    For the time after its rows were tokenised, which took a hundred times as long as one more hash does.
    """
    with suppress(OSError, DataError):
        found = file.stat()
        if found.st_size > ALWAYS_READ and _is_settled(found):
            content_hash(file, notes)  # which takes no time where there is a note


def _is_settled(found: os.stat_result) -> bool:
    return time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED * 1e9


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all; after a power cut it may be anything, which its checksum tells."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".note-", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as target:
            target.write(data)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _inner(tokenizer: Any) -> Any:
    """The transformers tokenizer inside mlx-lm's wrapper, or the tokenizer itself."""
    inner = vars(tokenizer).get("_tokenizer")
    return inner if hasattr(inner, "apply_chat_template") else tokenizer
