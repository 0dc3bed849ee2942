"""How rows are read and where their tokens are kept, from the settings."""

from __future__ import annotations

from pathlib import Path

from runner.common.cache_dir import cache_dir
from runner.config import schema
from runner.data.formats import ColumnNames, EncodeOptions
from runner.data.token_cache import TokenCache


def encode_options(data: schema.DataConfig) -> EncodeOptions:
    """The part of the data settings that decides a row's tokens."""
    return EncodeOptions(
        format=data.format,
        mask_prompt=data.mask_prompt,
        max_length=data.max_length,
        on_too_long=data.on_too_long,
        keys=ColumnNames(**vars(data.keys)),
        chat_template=data.chat_template,
    )


def token_cache_from(data: schema.DataConfig) -> TokenCache | None:
    """Where tokens are kept between runs; None where they are not."""
    if not data.cache:
        return None
    own = Path(data.cache_folder).expanduser().absolute() if data.cache_folder else cache_dir() / "tokens"
    return TokenCache(own, int(data.cache_gb * 1e9))
