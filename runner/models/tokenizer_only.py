"""The tokenizer of a base model without its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from runner.common.errors import ModelError, RunnerError, did_you_mean
from runner.config import schema
from runner.data.lazy_tokenizer import LazyTokenizer
from runner.models import fetch, hub

_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "tokenizer*"]
"""What tokenizers read of a hub repository."""


def load_tokenizer_only(config: schema.ModelConfig) -> TokenizerWrapper | LazyTokenizer:
    """Return the tokenizer of the model that `config` names, from a folder one that is loaded at its first use.

    Of a hub repository, only the files of the tokenizer are downloaded.

    Raises:
        ModelError: there is no such model, or its tokenizer is not supported.
    """
    path = config.path
    if path == "builtin:tiny":
        from runner.models import tiny

        return tiny.build_tokenizer()
    if path.startswith("builtin:"):
        name, known = path.removeprefix("builtin:"), ("tiny", *fetch.BUILTIN_MODELS)
        if name not in known:
            raise ModelError(f"model.path={path} is not built in: {', '.join(known)}.{did_you_mean(name, known)}")
        return _gguf_tokenizer(fetch.fetch_model(name))
    if path.endswith(".gguf"):
        if not Path(path).is_file():
            raise ModelError(f"model.path={path}: no such file.")
        return _gguf_tokenizer(Path(path))
    try:
        folder = Path(path) if Path(path).is_dir() else _download(path, config.revision)
        eos_token_ids = _eos_token_ids(folder)
    except RunnerError:
        raise
    except Exception as error:  # the hub's library raises all kinds of errors
        raise hub.load_error(path, error, "tokenizer") from error

    def load() -> TokenizerWrapper:
        from mlx_lm.utils import load_tokenizer

        try:
            return load_tokenizer(folder, {"trust_remote_code": config.trust_remote_code}, eos_token_ids=eos_token_ids)
        except Exception as error:
            raise hub.load_error(path, error, "tokenizer") from error

    return LazyTokenizer(load, None if config.trust_remote_code else folder)


def _gguf_tokenizer(file: Path) -> TokenizerWrapper:
    from runner.models.gguf import tokenizer
    from runner.models.gguf.header import read_header

    metadata = read_header(file).metadata
    return tokenizer.wrap_tokenizer(tokenizer.build_tokenizer(metadata, file), metadata)


def _download(path: str, revision: str | None) -> Path:
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise ModelError(f"model.path={path}: no such folder or file (a hub id has the form ORGANISATION/NAME).")
    from mlx_lm.utils import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=_FILES))


def _eos_token_ids(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("eos_token_id") if isinstance(config, dict) else None
