"""YAML that is data and nothing else, from files that may be damaged or hostile: bounded in time, memory and depth.

libyaml reads a stored config seven times as fast as PyYAML's own parser, but its composer overflows the stack on deep
nesting; so the flat stream of events is looked through first, and only what has passed is built.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from runner.common.errors import ConfigError

LIMIT = 1_000_000
"""Bytes of a file; a stored config has about 3,000."""
_DEPTH = 32
_MOST_VALUES = 500_000
_LONGEST_REFERENCE = 1000
"""Characters of a text with ${…}: the time to read it grows with its nesting."""
# YAML 1.1 reads 1:30:00 as a number to base 60, in time that grows with the square of its length; and Python will
# not print an integer of thousands of digits.
_LONG_NUMBER = re.compile(r"[-+0-9_:.]{100,}|[-+]?0[xob][0-9a-fA-F_]{98,}")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in the file `path`.

    Raises:
        ValueError: with the reason, without the path: not a regular file, too large, not plain YAML, not a mapping.
        OSError: it is missing or cannot be read.
    """
    found = parse(_read(path))
    if not isinstance(found, dict):
        raise ValueError("it does not hold settings (key: value)")
    return found


def parse(text: str) -> Any:
    """The value that `text` holds: no aliases (a bomb needs them), no tags, no deep nesting.

    Raises:
        ValueError: with the reason.
    """
    try:
        _look_through(text, with_aliases=False)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not plain YAML: {' '.join(str(error).split())[:200]}") from None


def require_bounded(path: Path) -> None:
    """Refuse the file `path` where `parse` would, but for aliases: those that stay small are a person's own.

    Text that is not YAML at all passes: whoever reads it says what is wrong, and where.

    Raises:
        ValueError, OSError: as of `read_mapping`.
    """
    text = _read(path)
    with suppress(yaml.YAMLError):
        _look_through(text, with_aliases=True)


def _read(path: Path) -> str:
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as source:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is not a regular file")
        data = source.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise ValueError(f"it is larger than {LIMIT:,} bytes")
    return data.decode("utf-8")


def _look_through(text: str, with_aliases: bool) -> None:
    sizes: dict[str, int] = {}
    """Of each anchor, how many values its node has, aliases expanded."""
    opened: list[list[Any]] = [["", 0]]
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            if not with_aliases or event.anchor not in sizes:
                raise ValueError(f"it uses a YAML alias (*{str(event.anchor)[:40]}): refused")
            opened[-1][1] += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
            opened[-1][1] += size
            sizes |= {anchor: size} if anchor else {}
        elif isinstance(event, (yaml.CollectionStartEvent, yaml.ScalarEvent)):
            if event.tag is not None:
                raise ValueError(f"it uses a YAML tag ({event.tag[:60]}): refused")
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append([event.anchor, 1])
                if len(opened) > _DEPTH + 1:
                    raise ValueError(f"it is nested more than {_DEPTH} levels deep")
                continue
            opened[-1][1] += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
            if _LONG_NUMBER.fullmatch(event.value):
                raise ValueError(f"it holds a number of {len(event.value):,} characters")
            if "${" in event.value and (len(event.value) > _LONGEST_REFERENCE or _brackets(event.value) > _DEPTH):
                raise ValueError(f"it holds references (${{…}}) in a text of {len(event.value):,} characters")
        if opened[-1][1] > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values")


def _brackets(text: str) -> int:
    """How deeply a reference could be nested."""
    return text.count("[") + text.count("{") - text.count("${") + text.count("(")


def load_yaml_file(path: Path, missing: str) -> dict[str, Any]:
    """Plain data from a small YAML file that a stranger may have written; see `read_mapping`.

    Raises:
        ConfigError: names the file and the reason.
    """
    try:
        return read_mapping(path)
    except FileNotFoundError:
        raise ConfigError(missing) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
