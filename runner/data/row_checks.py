"""Checks of the values of a row, whatever its format; each raises RowError with the reason."""

from __future__ import annotations

from itertools import islice
from typing import Any

from runner.common.errors import did_you_mean
from runner.common.text import shorten
from runner.data.conversation import REASONING_FIELDS, TOOL_ROLES
from runner.data.jsonl import json_type
from runner.data.row_errors import RowError

ROLES = ("system", "developer", "user", "assistant", *TOOL_ROLES)
ROLE_ALIASES = {"human": "user"} | dict.fromkeys(("gpt", "bot", "ai", "model"), "assistant")
"""Names that other data sets use, for a hint in the error message."""
_MAX_LISTED_KEYS = 20


def require_keys(row: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Refuse a row without one of the `keys`."""
    for key in keys:
        if key not in row:
            hint = did_you_mean(key, set(row) - set(keys)) if len(row) <= _MAX_LISTED_KEYS else ""
            raise RowError(f"no key '{key}'; the row has: {list_keys(row)}.{hint}")


def list_keys(row: dict[str, Any]) -> str:
    """Return the keys of a row for a message."""
    listed = ", ".join(f"'{shorten(key, 60)}'" for key in islice(row, _MAX_LISTED_KEYS))
    return (listed or "none") + (f" and {len(row) - _MAX_LISTED_KEYS} more" if len(row) > _MAX_LISTED_KEYS else "")


def require_string(value: Any, name: str) -> None:
    """Refuse what is no string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise RowError(f"{name} is {json_type(value)}, not a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"{name} has half of a surrogate pair at character {error.start + 1}") from None


def _require_unicode(value: Any, name: str) -> None:
    """Refuse texts at any depth of a message that no tokenizer can encode."""
    if isinstance(value, str):
        require_string(value, f"the content of {name}")
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _require_unicode(item, name)


def require_text(value: Any, name: str) -> None:
    """Refuse what is no string, or a blank one."""
    require_string(value, name)
    if not value.strip():
        raise RowError(f"{name} is empty")


def validate_message(message: Any, name: str) -> None:
    """Refuse a message of a conversation without a known role and a content."""
    if not isinstance(message, dict):
        raise RowError(f"{name} is {json_type(message)}, not an object with 'role' and 'content'")
    _require_field(message, "role", name)
    role = message["role"]
    if role not in ROLES:
        alias = ROLE_ALIASES.get(role) if isinstance(role, str) else None
        hint = f" Did you mean '{alias}'?" if alias else did_you_mean(str(role), ROLES)
        raise RowError(f"{name} has the role {shorten(repr(role), 60)}; known: {', '.join(ROLES)}.{hint}")
    if message.get("function_call"):
        raise RowError(f"{name} has a 'function_call', the old form of 'tool_calls'; write it as those")
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise RowError(f"'tool_calls' of {name} is {json_type(calls)}, not a list")
    says_something = calls or any(message.get(key) for key in REASONING_FIELDS)
    if not (role == "assistant" and message.get("content") is None and says_something):
        _require_field(message, "content", name)
        _validate_content(message["content"], role, f"the content of {name}")
    _require_unicode(message, name)


def _validate_content(content: Any, role: str, name: str) -> None:
    """Refuse a content that is neither text nor a list of parts; a tool's result may be any value but null."""
    if isinstance(content, list) or (role in TOOL_ROLES and content is not None):
        for part in content if role not in TOOL_ROLES else ():
            if not isinstance(part, dict):
                raise RowError(f"{name} contains {json_type(part)}; each part must be an object")
    else:
        require_string(content, name)


def _require_field(message: dict[str, Any], key: str, name: str) -> None:
    if key not in message:
        raise RowError(f"{name} has no '{key}'.{did_you_mean(key, message)}")


def validate_tools(row: dict[str, Any]) -> None:
    """Refuse tools that are no list."""
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"'tools' is {json_type(tools)}, not a list")
