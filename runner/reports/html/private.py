"""What must not stand in a page that is passed on: paths of this machine, names of its hosts and users."""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

_CONTROLS = {
    code: "·"
    for code in [*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    if chr(code) not in "\n\t"
}
"""Control characters, and those that turn the direction of what follows them."""
_ABSOLUTE = re.compile(r"(?<![\w.~…/\\-])(?:[A-Za-z]:)?(?:/[\w.@+%=,-]+){2,}/?")
"""An absolute path of two parts or more."""
_HOME = re.compile(r"(?<![\w.~…-])/(?:home|Users)/[^/\s'\"]+")
_END = r"(?![\w-])"
_MIN_HOST_LENGTH = 3
_NUMBERS = {int, float, type(None)}
_VERBATIM = ("samples",)
"""Kinds of parts that show rows of the data, which stay as they are."""


class Privacy:
    """Replaces what is private in the texts of a page about what is in `folder`."""

    def __init__(self, folder: Path, hosts: Iterable[object] = ()) -> None:
        """`hosts`: names of machines beside this one."""
        absolute, here = folder.absolute(), Path.cwd()
        below_here = absolute.is_relative_to(here) and absolute != here
        shown = os.path.relpath(absolute, here) if below_here else absolute.name
        replaced = {str(absolute): shown, str(absolute.resolve()): shown}
        replaced |= {f"{base}/": "" for base in (here, here.resolve()) if len(base.parts) > 1}
        replaced |= {str(base): "~" for base in (Path.home(), Path.home().resolve()) if len(base.parts) > 1}
        self._paths = [
            (re.compile(rf"(?<![\w.-]){re.escape(path)}{'' if path[-1] == '/' else _END}"), replacement)
            for path, replacement in replaced.items()
        ]
        names = {socket.gethostname(), *(host for host in hosts if isinstance(host, str))}
        names |= {name.partition(".")[0] for name in names}
        names = {name for name in names if len(name) >= _MIN_HOST_LENGTH and name != "localhost"}
        alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        self._hosts = re.compile(rf"(?<![\w.-])(?:{alternatives}){_END}") if names else None

    def text(self, text: str) -> str:
        """Return `text` with paths relative or cut to their last part, without host names and control characters."""
        text = text.translate(_CONTROLS)
        if "/" in text:
            for pattern, replacement in self._paths:
                text = replacement.join(pattern.split(text))
            text = _HOME.sub("~", text)
            text = _ABSOLUTE.sub(lambda match: f"…/{match[0].rstrip('/').rpartition('/')[2]}", text)
        return self._hosts.sub("its host", text) if self._hosts else text

    def clean(self, data: Any) -> Any:
        """Return nested `data` in types that JSON has, its texts cleaned; rows of the data keep all but controls."""
        return _converted(data, self.text)


def _converted(data: Any, convert: Callable[[str], str]) -> Any:
    if isinstance(data, str):
        return convert(data)
    if isinstance(data, Mapping):
        if data.get("kind") in _VERBATIM:
            convert = _printable
        return {key: value if key == "href" else _converted(value, convert) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        if set(map(type, data)) <= _NUMBERS:  # the points of a curve, by far the most values of a page
            return [value if value is not None and math.isfinite(value) else None for value in data]
        return [_converted(value, convert) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    return data if data is None or isinstance(data, int) else convert(str(data))


def _printable(text: str) -> str:
    return text.translate(_CONTROLS)
