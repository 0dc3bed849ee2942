"""Values quoted for the grammar of Hydra's overrides."""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[\w/.:@%+-]*", re.ASCII)
_OTHER_THAN_TEXT = re.compile(r"[-+]?[\d_]*\.?[\d_]*(e[-+]?\d+)?|[-+]?(inf|nan)|true|false|null", re.IGNORECASE)


def quote_path(value: str) -> str:
    """`value` as a word that Hydra's grammar reads back as the same text."""
    if _PLAIN.fullmatch(value) and not _OTHER_THAN_TEXT.fullmatch(value):
        return value
    # Hydra's quoted strings escape the quote itself, and a backslash only in front of one (the closing one included).
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"
