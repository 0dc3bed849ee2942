"""How rows are read, from the settings."""

from __future__ import annotations

from runner import config
from runner.data.formats import Keys, Reading


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
