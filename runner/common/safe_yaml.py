"""YAML as plain data, from files that may be damaged or hostile: bounded in time, memory and depth.

libyaml reads a stored config seven times as fast as PyYAML's own parser, but its composer overflows the stack on deep
nesting; so the flat stream of events is checked first, and values are built only from what has passed.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from runner.common.errors import ConfigError
from runner.common.filesystem import read_bounded

MAX_BYTES = 1_000_000
"""Limit of a file; a stored config has about 3,000 bytes."""
_MAX_DEPTH = 32
_MAX_VALUES = 500_000
_MAX_REFERENCE_LENGTH = 1000
"""Characters of a text with ${…}: the time to resolve it grows with its nesting."""
# YAML 1.1 reads 1:30:00 as a number in base 60, in time that grows with the square of its length; and Python does
# not print an integer of thousands of digits.
_LONG_NUMBER = re.compile(r"[-+0-9_:.]{100,}|[-+]?0[xob][0-9a-fA-F_]{98,}")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in the file `path`.

    Raises:
        ValueError: with the reason, without the path: too large, not plain YAML, not a mapping.
        OSError: it is missing, not a regular file, or cannot be read.
    """
    mapping = parse(read_bounded(path, MAX_BYTES).decode())
    if not isinstance(mapping, dict):
        raise ValueError("it does not hold settings (key: value)")
    return mapping


def parse(text: str) -> Any:
    """Return the value that `text` holds. Aliases (which a bomb consists of), tags and deep nesting are refused.

    Raises:
        ValueError: with the reason.
    """
    try:
        _check_events(text, allow_aliases=False)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not plain YAML: {' '.join(str(error).split())[:200]}") from None


def require_bounded(path: Path) -> None:
    """Refuse the file `path` if `parse` would, but allow aliases that do not expand beyond the limits.

    Text that is not YAML passes: the program that reads it reports what is wrong, and where.

    Raises:
        ValueError, OSError: as of `read_mapping`.
    """
    text = read_bounded(path, MAX_BYTES).decode()
    with suppress(yaml.YAMLError):
        _check_events(text, allow_aliases=True)


def _check_events(text: str, allow_aliases: bool) -> None:
    sizes: dict[str, int] = {}  # number of values of each anchor's node, with its aliases expanded
    open_nodes: list[list[Any]] = [["", 0]]  # anchor and number of values
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            if not allow_aliases or event.anchor not in sizes:
                raise ValueError(f"it uses a YAML alias (*{str(event.anchor)[:40]}): refused")
            open_nodes[-1][1] += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            open_nodes[-1][1] += size
            sizes |= {anchor: size} if anchor else {}
        elif isinstance(event, (yaml.CollectionStartEvent, yaml.ScalarEvent)):
            if event.tag is not None:
                raise ValueError(f"it uses a YAML tag ({event.tag[:60]}): refused")
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append([event.anchor, 1])
                if len(open_nodes) > _MAX_DEPTH + 1:
                    raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
                continue
            open_nodes[-1][1] += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
            if _LONG_NUMBER.fullmatch(event.value):
                raise ValueError(f"it holds a number of {len(event.value):,} characters")
            if "${" in event.value and (
                len(event.value) > _MAX_REFERENCE_LENGTH or _max_nesting(event.value) > _MAX_DEPTH
            ):
                raise ValueError(f"it holds references (${{…}}) in a text of {len(event.value):,} characters")
        if open_nodes[-1][1] > _MAX_VALUES:
            raise ValueError(f"it holds more than {_MAX_VALUES:,} values")


def _max_nesting(text: str) -> int:
    """Return how deeply a reference in `text` could be nested."""
    return text.count("[") + text.count("{") - text.count("${") + text.count("(")


def load_yaml_file(path: Path, missing: str) -> dict[str, Any]:
    """Return the mapping in the file `path`; see `read_mapping`.

    Args:
        missing: the message if there is no such file.

    Raises:
        ConfigError: names the file and the reason.
    """
    try:
        return read_mapping(path)
    except FileNotFoundError:
        raise ConfigError(missing) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
