"""How rows are read and where their tokens are kept, from the settings."""

from __future__ import annotations

from pathlib import Path

from runner import config
from runner.cache import cache_folder
from runner.data.formats import Keys, Reading
from runner.data.token_cache import TokenCache


def reading_of(data: config.Data) -> Reading:
    """The part of the data settings that decides a row's tokens."""
    return Reading(
        format=data.format,
        mask_prompt=data.mask_prompt,
        max_length=data.max_length,
        on_too_long=data.on_too_long,
        keys=Keys(**vars(data.keys)),
        chat_template=data.chat_template,
    )


def cache_of(data: config.Data) -> TokenCache | None:
    """Where tokens are kept between runs; None where they are not."""
    if not data.cache:
        return None
    own = Path(data.cache_folder).expanduser().absolute() if data.cache_folder else cache_folder() / "tokens"
    return TokenCache(own, int(data.cache_gb * 1e9))
