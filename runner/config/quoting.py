"""Text quoted for the grammar of Hydra's overrides, and read back."""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[\w/.:@%+-]*", re.ASCII)
_OTHER_THAN_TEXT = re.compile(r"[-+]?[\d_]*\.?[\d_]*(e[-+]?\d+)?|[-+]?(inf|nan)|true|false|null", re.IGNORECASE)


def quote_path(value: str) -> str:
    """Return `value` so that Hydra's grammar reads it back as the same text."""
    if _PLAIN.fullmatch(value) and not _OTHER_THAN_TEXT.fullmatch(value):
        return value
    # Hydra's quoted strings escape the quote itself, and a backslash only in front of one (the closing one included).
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def unquote(value: str) -> str:
    """Return the text that Hydra's grammar reads from `value`, a quoted string or plain text."""
    if len(value) < 2 or value[0] != value[-1] or value[0] not in "'\"":
        return value
    return re.sub(rf"(\\+)({value[0]}|$)", lambda found: "\\" * (len(found[1]) // 2) + found[2], value[1:-1])
