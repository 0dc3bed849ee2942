"""YAML that is data and nothing else, from files that may be damaged or hostile: bounded in time, memory and depth.

libyaml reads a stored config seven times as fast as PyYAML's own parser, but its composer overflows the stack on deep
nesting; so the flat stream of events is looked through first, and only what has passed is built.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

LIMIT = 1_000_000
"""Bytes of a file; a stored config has about 3,000."""
_DEPTH = 32
# YAML 1.1 reads 1:30:00 as a number to base 60, in time that grows with the square of its length.
_LONG_NUMBER = re.compile(r"[-+0-9_:.]{100,}")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in the file `path`.

    Raises:
        ValueError: with the reason, without the path: not a regular file, too large, not plain YAML, not a mapping.
        OSError: it is missing or cannot be read.
    """
    # O_NONBLOCK: opening a FIFO must not wait for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as source:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is not a regular file")
        data = source.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise ValueError(f"it is larger than {LIMIT:,} bytes")
    found = parse(data.decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it does not hold settings (key: value)")
    return found


def parse(text: str) -> Any:
    """The value that `text` holds: no aliases (a bomb needs them), no tags, no deep nesting.

    Raises:
        ValueError: with the reason.
    """
    try:
        _look_through(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not plain YAML: {' '.join(str(error).split())[:200]}") from None


def _look_through(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it uses a YAML alias (*{str(event.anchor)[:40]}): refused")
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, (yaml.CollectionStartEvent, yaml.ScalarEvent)):
            if event.tag is not None:
                raise ValueError(f"it uses a YAML tag ({event.tag[:60]}): refused")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _DEPTH:
                    raise ValueError(f"it is nested more than {_DEPTH} levels deep")
            elif _LONG_NUMBER.fullmatch(event.value):
                raise ValueError(f"it holds a number of {len(event.value):,} characters")
