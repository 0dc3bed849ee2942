"""The key of cached tokens: a hash of the file's content, the tokenizer, the encode options and the code.

**The content of a file** is identified by its SHA-256. A file of up to `ALWAYS_HASHED_BYTES` is hashed at every start.
A larger one is hashed once, and the hash is stored together with the file's size, inode, device and its times of the
last change of content (mtime) and of anything (ctime); as long as all of these are the same, the stored hash is used.
The hash is stored only if both times are at least `SETTLED_SECONDS` old when hashing begins, so that an edit of the
same size within the resolution of the clock cannot go unnoticed: any later edit gets a different time. (A program may
reset the mtime after an edit, but not the ctime.) While a file is tokenized it is hashed once more, and the tokens are
stored only under that hash.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from runner.common import disk_cache
from runner.common.disk_cache import CacheWriteError, DiskCache
from runner.common.errors import DataError
from runner.data.chat_template import DATE_FUNCTION, writes_date
from runner.data.formats import EncodeOptions
from runner.data.jsonl import open_data_file
from runner.data.turn_ends import stop_ids

ALWAYS_HASHED_BYTES = 16 << 20
"""Hashing so much takes 20 ms."""
SETTLED_SECONDS = 3.0
"""FAT stores times with a resolution of 2 s, every other file system with a finer one."""
PACKAGES = ("tokenizers", "transformers", "mlx-lm", "jinja2")
CODE_FILES = (
    "jsonl.py",
    "readers.py",
    "holdout.py",
    "formats.py",
    "preferences.py",
    "conversions.py",
    "conversation.py",
    "template_traits.py",
    "turn_ends.py",
    "rendered_row.py",
    "chat_encoder.py",
    "chat_spans.py",
    "chat_template.py",
    "text_encoder.py",
    "encoded.py",
    "encode.py",
    "token_set.py",
)
"""Files of this package that decide tokens. The key contains their text rather than a version number, which somebody
could forget to raise; the run would then train on tokens of the former code."""
_DATED = "-dated"
_TOKENIZER_SETTINGS = (
    "_add_bos_token",
    "_add_eos_token",
    "add_prefix_space",
    "split_special_tokens",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
)
_NONDETERMINISTIC = re.compile(
    r"\w*strftime\w*|\b(?:date)?(?:time_)?now(?=\s*\()|\blipsum\b|(?:\||\bmap\()[\s'\"]*random\b"
)
"""What makes a chat template give different text at different times: the date, and Jinja's random functions."""


def uncacheable_reason(tokenizer: Any, options: EncodeOptions) -> str | None:
    """Return why tokens of this tokenizer cannot be cached, or None where they can."""
    inner, template = _unwrap(tokenizer), options.template
    # The tokens of a slow tokenizer, or one that comes with the model, depend on code, which cannot be serialized.
    if not (hasattr(inner, "backend_tokenizer") and type(inner).__module__.startswith(("transformers.", "mlx_lm."))):
        return "the tokenizer is custom code"
    if options.format == "text" or not options.chat_template:
        return None
    if template.text is None and getattr(tokenizer, "_chat_template", None) is not None:
        return "the model's chat template is custom code"
    text = str(getattr(inner, "chat_template", None)) if template.text is None else template.text
    is_fixed = isinstance(getattr(inner, "chat_template", None), str) or template.text is not None
    for match in _NONDETERMINISTIC.finditer(text):
        if not (match[0] == DATE_FUNCTION and template.date is not None and is_fixed):
            return f"the model's chat template uses {match[0]}, so its text varies over time"
    return None


def cache_key(content: str, tokenizer: str, options: EncodeOptions) -> str:
    """Return the key (SHA-256, hex) for a file with the hash `content` and a tokenizer with the given identity."""
    if not depends_on_date(tokenizer, options):
        options = replace(options, template=replace(options.template, date=None))
    return disk_cache.cache_key(
        {"content": content, "tokenizer": tokenizer, "options": asdict(options), "code": code_identity()}
    )


def depends_on_date(tokenizer: str, options: EncodeOptions) -> bool:
    """Return whether the chat template writes today's date; `tokenizer` is the identity of the tokenizer."""
    text = options.template.text
    return tokenizer.endswith(_DATED) if text is None else writes_date(text)


def tokenizer_identity(tokenizer: Any) -> str:
    """Return a SHA-256 (hex) of everything that decides the tokens and chat texts of a fast tokenizer.

    It has the suffix `_DATED` where the chat template writes today's date.
    """
    inner = _unwrap(tokenizer)
    identity = disk_cache.cache_key(
        {
            "classes": [f"{type(each).__module__}.{type(each).__qualname__}" for each in (tokenizer, inner)],
            "state": inner.backend_tokenizer.to_str(),
            "special": [inner.special_tokens_map, inner.all_special_ids, inner.eos_token_id, inner.get_added_vocab()],
            "template": [inner.chat_template, getattr(tokenizer, "_thinking_kwarg", None)],
            "thinking": getattr(tokenizer, "has_thinking", None),
            "stop": sorted(stop_ids(tokenizer)),
            "has_chat_template": getattr(tokenizer, "has_chat_template", None),
            "settings": {name: vars(inner).get(name) for name in _TOKENIZER_SETTINGS},
        }
    )
    return identity + _DATED if writes_date(str(inner.chat_template)) else identity


@cache
def code_identity() -> str:
    """Return a SHA-256 (hex) of the code that makes tokens, in this package and in those that it calls."""
    digest = hashlib.sha256(f"Python {sys.version_info[:2]}\n".encode())
    for name in PACKAGES:
        digest.update(f"{name} {version(name)}\n".encode())
    for name in CODE_FILES:
        digest.update(hashlib.sha256((Path(__file__).parent / name).read_bytes()).digest())
    return digest.hexdigest()


def content_hash(file: Path, hashes: DiskCache) -> str:
    """Return the SHA-256 (hex) of the content of `file`; for a large one, possibly as stored in `hashes`.

    Raises:
        DataError: the file cannot be read.
    """
    with open_data_file(file) as opened:
        status = os.fstat(opened.fileno())
        if status.st_size <= ALWAYS_HASHED_BYTES:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        version_of_file = {
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "ctime_ns": status.st_ctime_ns,
            "inode": status.st_ino,
            "device": status.st_dev,
        }
        key = disk_cache.cache_key({"path": os.fsencode(file.resolve()).hex()})
        stored = hashes.read_record(key) or {}
        content = stored.pop("content", None)
        if stored == version_of_file and isinstance(content, str):
            return content
        settled = _is_settled(status)
        content = hashlib.file_digest(opened, "sha256").hexdigest()
    if settled:
        with suppress(CacheWriteError):
            hashes.write_record(key, {**version_of_file, "content": content})
    return content


def store_content_hash(file: Path, hashes: DiskCache) -> None:
    """Store the hash of a large `file` that was too new for it when `content_hash` hashed it, if it has settled since.

    Called after tokenizing the file, which takes a hundred times as long as hashing it again.
    """
    with suppress(OSError, DataError):
        status = file.stat()
        if status.st_size > ALWAYS_HASHED_BYTES and _is_settled(status):
            content_hash(file, hashes)  # returns at once where the hash is stored already


def _is_settled(status: os.stat_result) -> bool:
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_SECONDS * 1e9


def _unwrap(tokenizer: Any) -> Any:
    """Return the transformers tokenizer inside mlx-lm's wrapper, or the tokenizer itself."""
    inner = vars(tokenizer).get("_tokenizer")
    return inner if hasattr(inner, "apply_chat_template") else tokenizer
