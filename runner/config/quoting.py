"""Text and values quoted for the grammar of Hydra's overrides and for YAML, and read back."""

from __future__ import annotations

import json
import re
from typing import Any

_PLAIN = re.compile(r"[\w/.:@%+-]*", re.ASCII)
_OTHER_TYPE = re.compile(r"[-+]?[\d_]*\.?[\d_]*(e[-+]?\d+)?|[-+]?(inf|nan)|true|false|null", re.IGNORECASE)
_PLAIN_YAML = re.compile(r"(?!(?:true|false|null|yes|no|on|off|y|n|inf|nan)$)[A-Za-z][\w/.:-]*\w", re.I | re.ASCII)


def quote_text(text: str) -> str:
    """Return `text` so that Hydra's grammar reads it back as the same text."""
    if _PLAIN.fullmatch(text) and not _OTHER_TYPE.fullmatch(text):
        return text
    # Hydra's quoted strings escape the quote itself, and a backslash only in front of one (the closing one included).
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text) + "'"


def unquote(text: str) -> str:
    """Return the text that Hydra's grammar reads from `text`, a quoted string or plain text."""
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        return text
    return re.sub(rf"(\\+)({text[0]}|$)", lambda found: "\\" * (len(found[1]) // 2) + found[2], text[1:-1])


def unescape(text: str) -> str:
    """Return the text that Hydra's grammar reads from plain `text`, in which special characters are escaped."""
    return re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", text)


def quote_value(value: Any) -> str:
    """Return a scalar or a list so that Hydra's grammar reads it back with the same type."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(quote_value, value))}]"
    return quote_text(value) if isinstance(value, str) else scalar_text(value)


def yaml_value(value: Any) -> str:
    """Return a scalar or a list as YAML 1.1 flow style, which every YAML reader reads back with the same type."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(yaml_value, value))}]"
    if isinstance(value, str):
        return value if _PLAIN_YAML.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "e" in repr(value):  # YAML 1.1 reads 1e-08 as text
        mantissa, exponent = repr(value).split("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+}"
    return scalar_text(value)


def scalar_text(value: Any) -> str:
    """Return a number, a truth value or null as YAML and Hydra write it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
