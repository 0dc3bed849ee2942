"""A tokenizer that is loaded only when something has to be tokenized; cached tokens need none.

Loading takes half a second and at least 60 MB. Until then the tokenizer is identified by the files of its folder.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.common.filesystem import is_apple_double
from runner.common.result_cache import CachedResult
from runner.data.formats import EncodeOptions
from runner.data.token_cache_key import code_identity

_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".npz", ".h5", ".onnx", ".msgpack", ".index.json")
_TEMPLATES = "additional_chat_templates"
"""A folder that transformers reads beside the files of a tokenizer."""
_MAX_FILES, _MAX_FILE_BYTES = 200, 100_000_000


class LazyTokenizer:
    """A tokenizer that is loaded once, at its first use."""

    def __init__(self, load: Callable[[], Any], folder: Path | None) -> None:
        """`folder` contains everything that `load` reads; None where something else decides too, such as code."""
        self._load, self._folder = load, folder
        self._loaded: Any = None
        self._identity_before_load: CachedResult | None = None

    @property
    def tokenizer(self) -> Any:
        """mlx-lm's TokenizerWrapper. Raises what `load` raises."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property
    def identified_by_files(self) -> bool:
        """Whether cached tokens save loading the tokenizer."""
        return self._folder is not None

    def cached_identity(self, options: EncodeOptions) -> str | None:
        """Return the `tokenizer_identity` of these files as stored by an earlier run, without loading; else None."""
        self._identity_before_load = self._cached_identity(options) if self._loaded is None else None
        values = self._identity_before_load.load() if self._identity_before_load else None
        identity = values.get("identity") if values else None
        return identity if isinstance(identity, str) else None

    def store_identity(self, options: EncodeOptions, identity: str) -> None:
        """Store the identity for `cached_identity`, unless the files changed since the tokenizer was loaded."""
        if self._identity_before_load and self._identity_before_load == self._cached_identity(options):
            self._identity_before_load.store({"identity": identity})

    def _cached_identity(self, options: EncodeOptions) -> CachedResult | None:
        """Return the cache entry of the identity, keyed by all that decides it and whether tokens can be cached."""
        files = _hash_files(self._folder) if self._folder else None
        if files is None:
            return None
        fields = asdict(options)
        fields["template"]["date"] = options.template.date is not None  # which date does not matter
        return CachedResult.of("tokenizers", {"files": files, "options": fields, "code": code_identity()})


def resolve_tokenizer(tokenizer: Any) -> Any:
    """Return the tokenizer itself, loading it where it is a LazyTokenizer."""
    return tokenizer.tokenizer if isinstance(tokenizer, LazyTokenizer) else tokenizer


def _hash_files(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 by name of a model folder's files except weights.

    None where there are too many files, or one is too large, unreadable or not a regular file.
    """
    hashes: dict[str, str] = {}
    try:
        for subfolder in (folder, folder / _TEMPLATES):
            for entry in os.scandir(subfolder) if subfolder.is_dir() else ():
                if entry.is_dir() or entry.name.endswith(_WEIGHT_SUFFIXES) or is_apple_double(entry.name):
                    continue
                status = entry.stat()
                if len(hashes) == _MAX_FILES or status.st_size > _MAX_FILE_BYTES or not stat.S_ISREG(status.st_mode):
                    return None
                with open(entry.path, "rb") as file:
                    hashes[str(Path(entry.path).relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
    return hashes
