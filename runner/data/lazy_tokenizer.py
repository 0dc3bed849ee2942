"""A tokenizer that is loaded when tokens are to be made: where an earlier run has kept them, none is needed.

Loading one takes half a second and 60 MB and more. What it would be is known by the files of its folder.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.common.fact_cache import Fact
from runner.data.formats import EncodeOptions
from runner.data.token_cache_key import code_identity

_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".npz", ".h5", ".onnx", ".msgpack", ".index.json")
_TEMPLATES = "additional_chat_templates"
"""A folder that transformers reads beside the files of a tokenizer."""
_MOST_FILES, _LARGEST = 200, 100_000_000


class LazyTokenizer:
    """A tokenizer, loaded once and when first asked for."""

    def __init__(self, load: Callable[[], Any], folder: Path | None) -> None:
        """`folder` has all that `load` reads; None where something else has a say, such as code."""
        self._load, self._folder = load, folder
        self._loaded: Any = None
        self._before: Fact | None = None

    @property
    def tokenizer(self) -> Any:
        """mlx-lm's TokenizerWrapper. Raises what `load` raises."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def known(self, reading: EncodeOptions) -> str | None:
        """The `tokenizer_identity` that a tokenizer of these files had, without loading it; None where none is kept."""
        self._before = self._fact(reading) if self._loaded is None else None
        kept = self._before.load() if self._before else None
        found = kept.get("identity") if kept else None
        return found if isinstance(found, str) else None

    def keep(self, reading: EncodeOptions, identity: str) -> None:
        """Keep what `known` did not find, unless the files were changed while the tokenizer was loaded."""
        if self._before and self._before == self._fact(reading):
            self._before.store({"identity": identity})

    @property
    def known_by_files(self) -> bool:
        """Whether tokens that are kept save loading it."""
        return self._folder is not None

    def _fact(self, reading: EncodeOptions) -> Fact | None:
        """Where the identity is kept, by all that decides it and whether tokens can be kept at all."""
        files = _files(self._folder) if self._folder else None
        if files is None:
            return None
        return Fact.of("tokenizers", {"files": files, "reading": asdict(reading), "code": code_identity()})


def resolve_tokenizer(given: Any) -> Any:
    """The tokenizer itself, loaded if it is one for later."""
    return given.tokenizer if isinstance(given, LazyTokenizer) else given


def _files(folder: Path) -> dict[str, str] | None:
    """SHA-256 by name of the files of a model folder, weights aside; None where they are too many, large or odd."""
    found: dict[str, str] = {}
    try:
        for part in (folder, folder / _TEMPLATES):
            for entry in os.scandir(part) if part.is_dir() else ():
                if entry.is_dir() or entry.name.endswith(_WEIGHTS):
                    continue
                there = entry.stat()
                if len(found) == _MOST_FILES or there.st_size > _LARGEST or not stat.S_ISREG(there.st_mode):
                    return None
                with open(entry.path, "rb") as opened:
                    found[str(Path(entry.path).relative_to(folder))] = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return None
    return found
