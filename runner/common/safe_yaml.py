"""YAML as plain data, from files that may be damaged or hostile: bounded in time, memory and depth.

libyaml reads a stored config seven times as fast as PyYAML's own parser, but its composer overflows the stack on deep
nesting; so the flat stream of events is checked, and values are built only from what has passed: from the same events,
and by PyYAML where a document has more than mappings, lists and scalars.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from runner.common.errors import ConfigError
from runner.common.filesystem import read_bounded

MAX_BYTES = 1_000_000
"""Limit of a file; a stored config has about 3,000 bytes."""
_MAX_DEPTH = 32
_MAX_VALUES = 500_000
_MAX_REMEMBERED_LENGTH = 100
_MIN_CHECKED_LENGTH = 33
"""Shorter texts are neither long numbers nor deeply nested references: 33 brackets would be needed."""
_MERGE = "tag:yaml.org,2002:merge"
_MAX_REFERENCE_LENGTH = 1000
"""Characters of a text with ${…}: the time to resolve it grows with its nesting."""
# YAML 1.1 reads 1:30:00 as a number in base 60, in time that grows with the square of its length; and Python does
# not print an integer of thousands of digits.
_LONG_NUMBER = re.compile(r"[-+0-9_:.]{100,}|[-+]?0[xob][0-9a-fA-F_]{98,}")
_SECTION = re.compile(r"^(?=[a-z_]+:(?: |$))", re.MULTILINE)
_NOT_OF_ONE_SECTION = re.compile(r"^(?:---|\.\.\.|%)|[&*]", re.MULTILINE)
"""Marks of documents, and what may be an anchor or an alias."""
_MAX_REMEMBERED_SECTION = 4000
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
    with suppress(ValueError, yaml.YAMLError, _UncommonYaml):  # the whole text says where it is wrong
        return _parse_sections(text)
    try:
        try:
            return _build(_checked_events(text, allow_aliases=False))
        except _UncommonYaml:
            for _ in _checked_events(text, allow_aliases=False):
                pass
            return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not plain YAML: {' '.join(str(error).split())[:200]}") from None


def _parse_sections(text: str) -> dict[Any, Any]:
    """Return the mapping in `text`, whose sections are parsed once where several configs share them, as in a sweep.

    A section is a line that begins with a key and all that follows until the next such line. A construct that goes on
    there, such as a quoted text, is incomplete without it.

    Raises:
        ValueError, yaml.YAMLError, _UncommonYaml: it has other parts, or a section cannot be parsed by itself.
    """
    start, *sections = _SECTION.split(text)
    if start or not sections or _NOT_OF_ONE_SECTION.search(text):
        raise _UncommonYaml
    mapping: dict[Any, Any] = {}
    for section in sections:
        found = _short_section(section) if len(section) <= _MAX_REMEMBERED_SECTION else _parse_section(section)
        mapping |= {key: _copied(value) for key, value in found.items()}
    return mapping


def _parse_section(text: str) -> dict[Any, Any]:
    found = _build(_checked_events(text, allow_aliases=False))
    if not isinstance(found, dict):
        raise _UncommonYaml
    return found


_short_section = lru_cache(maxsize=1000)(_parse_section)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def require_bounded(path: Path) -> None:
    """Refuse the file `path` if `parse` would, but allow aliases that do not expand beyond the limits.

    Text that is not YAML passes: the program that reads it reports what is wrong, and where.

    Raises:
        ValueError, OSError: as of `read_mapping`.
    """
    text = read_bounded(path, MAX_BYTES).decode()
    with suppress(yaml.YAMLError):
        for _ in _checked_events(text, allow_aliases=True):
            pass


def _checked_events(text: str, allow_aliases: bool) -> Iterator[yaml.Event]:
    """Yield the events of `text`, each once it is checked; raises ValueError at one that a reader must not build."""
    sizes: dict[str, int] = {}  # number of values of each anchor's node, with its aliases expanded
    open_nodes: list[list[Any]] = [["", 0]]  # anchor and number of values
    for event in yaml.parse(text, Loader=_Loader):
        if type(event) is yaml.ScalarEvent and event.tag is event.anchor is None:  # nearly all of them, so first
            open_nodes[-1][1] += 1
            if len(event.value) >= _MIN_CHECKED_LENGTH:
                _check_text(event.value)
        elif isinstance(event, yaml.AliasEvent):
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
            else:
                open_nodes[-1][1] += 1
                sizes |= {event.anchor: 1} if event.anchor else {}
                _check_text(event.value)
        if open_nodes[-1][1] > _MAX_VALUES:
            raise ValueError(f"it holds more than {_MAX_VALUES:,} values")
        yield event


def _check_text(text: str) -> None:
    """Raise ValueError where `text` takes long to read as a number, or to resolve."""
    if _LONG_NUMBER.fullmatch(text):
        raise ValueError(f"it holds a number of {len(text):,} characters")
    if "${" in text and (len(text) > _MAX_REFERENCE_LENGTH or _max_nesting(text) > _MAX_DEPTH):
        raise ValueError(f"it holds references (${{…}}) in a text of {len(text):,} characters")


class _UncommonYaml(Exception):
    """Raised where a document holds what PyYAML has to build: merged mappings, lists as keys, several documents."""


def _build(events: Iterable[yaml.Event]) -> Any:
    """Return the value of the events of one document, without recursion, as PyYAML would build it."""
    holder: list[Any] = []
    open_nodes: list[tuple[Any, list[Any]]] = [(holder, [])]
    """Containers that are not complete, each with the key that waits for its value, if it is a mapping."""
    for event in events:
        if type(event) is yaml.ScalarEvent:
            value: Any = _plain_scalar(event.value) if event.implicit[0] else event.value
        elif isinstance(event, yaml.CollectionStartEvent):
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
        else:
            if isinstance(event, yaml.CollectionEndEvent):
                open_nodes.pop()
            elif isinstance(event, yaml.DocumentStartEvent) and holder:
                raise _UncommonYaml
            continue
        container, waiting_key = open_nodes[-1]
        if isinstance(container, list):
            container.append(value)
        elif waiting_key:
            container[waiting_key.pop()] = value
        elif isinstance(value, dict | list):
            raise _UncommonYaml
        else:
            waiting_key.append(value)
        if isinstance(value, dict | list):
            open_nodes.append((value, []))
    if not holder:
        raise _UncommonYaml
    return holder[0]


def _plain_scalar(text: str) -> Any:
    """Return the value of a scalar without quotes; most of a config's are those of other configs too."""
    return _short_scalar(text) if len(text) <= _MAX_REMEMBERED_LENGTH else _scalar(text)


def _scalar(text: str) -> Any:
    loader = _Loader("")  # not SafeLoader, which mlx_lm.lora changes
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    if tag == _MERGE:
        raise _UncommonYaml
    return loader.construct_object(yaml.ScalarNode(tag, text))


_short_scalar = lru_cache(maxsize=10_000)(_scalar)


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
