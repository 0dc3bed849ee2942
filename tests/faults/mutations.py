"""Hostile input made from real files: bytes flipped, cut, spliced and repeated, JSON whose values are extremes.

Strategies of hypothesis, so that what breaks a reader is found small, and found again.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NUMBERS = (
    *("0", "-1", "1.5", "1e308", "1e999", "-1e999", "NaN", "Infinity", "true", "null", '""', "[]", "{}", '"x"'),
    *(str(2**bits + more) for bits in (31, 32, 62, 63, 64) for more in (-1, 0)),
    *("9" * 30, "1" * 5000, "0x" + "f" * 400, "-0", "1_0", "0.1e-400", "٣"),
)
"""What a number of a text is replaced by."""
TOKENS = (
    *(b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\", b"\\ud800", b"\\u0000", b"\n", b"\r", b"\r\n", b"\0", b"\xff"),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"- ", b"? ", b"&a ", b"*a", b"<<: ", b"!!python/none ", b"# "),
    *(b"---\n", b"...\n", b"| ", b"> ", b"%YAML 9.9\n", b"2026-13-41", b"0000-00-00", b"1:30:00", b"${", b"}", b"???"),
    *(
        b"0001-01-01 00:00:00+23:59",
        b"=",
        b"\t",
        b"\x1b[2J",
        b"\xe2\x80\xa8",
        b"[" * 2000,
        b'{"a":' * 2000,
        b"- " * 500,
    ),
)
WORDS = (2**8 - 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
"""What eight bytes of a binary file are replaced by."""

_PLACE = st.integers(0, 1 << 20)
_OPERATIONS = ("flip", "byte", "cut", "end", "repeat", "splice", "number", "token", "word", "swap")


def damaged(*wholes: bytes, most: int = 5) -> st.SearchStrategy[bytes]:
    """One of `wholes` after up to `most` changes."""
    change = st.tuples(st.sampled_from(_OPERATIONS), _PLACE, st.integers(0, 255), st.integers(0, 255))
    return st.builds(
        lambda number, changes: _apply_all(wholes, number, changes),
        st.integers(0, len(wholes) - 1),
        st.lists(change, min_size=1, max_size=most),
    )


def _apply_all(wholes: tuple[bytes, ...], number: int, changes: list[tuple[str, int, int, int]]) -> bytes:
    data = wholes[number]
    for name, place, one, two in changes:
        # Half of the changes fall into the first kilobyte, where headers are.
        at = place % (min(len(data), 1024) if place & 1 else len(data)) if data else 0
        data = _apply(data, name, at, one, two, wholes)
    return data


def _apply(data: bytes, name: str, at: int, one: int, two: int, wholes: tuple[bytes, ...]) -> bytes:
    end = at + 1 + (one if two & 1 else one % 8)
    if name == "flip":
        return data[:at] + bytes([data[at] ^ 1 << one % 8]) + data[at + 1 :] if data else data
    if name == "byte":
        return data[:at] + bytes([one]) + data[at + 1 :]
    if name == "cut":
        return data[:at] + data[end:]
    if name == "end":
        return data[:at]
    if name == "repeat":
        return data[:end] + data[at:end] * (1 + two % 8) + data[end:]
    if name == "splice":
        other = wholes[one % len(wholes)]
        return data[:at] + other[two * len(other) // 256 :]
    if name == "number":
        found = list(re.finditer(rb"-?\d+(\.\d+)?(e[-+]?\d+)?", data[:65536]))
        if not found:
            return data
        start, stop = found[at % len(found)].span()
        return data[:start] + NUMBERS[one % len(NUMBERS)].encode() + data[stop:]
    if name == "token":
        return data[:at] + TOKENS[one % len(TOKENS)] + data[at + two % 2 :]
    if name == "word":
        value = WORDS[one % len(WORDS)].to_bytes(8, "little")
        return data[:at] + value + data[at + 8 :]
    return data[:at] + data[end : end + end - at] + data[at:end] + data[end + end - at :]


SCALARS: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, -1, 1, 2**31, 2**63, 10**18, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan")])
    | st.text(max_size=12)
    | st.sampled_from(
        ["", "\ud800", "\x1b]0;x\x07", "a\nb", "../x", "${oc.env:HOME}", "x" * 5000, "nan", "1", "é" * 300]
    )
)
KEYS = st.text(max_size=6) | st.sampled_from(["step", "schema", "files", "words", "job", "state", "split", "loss"])
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=10
)
"""Any JSON value, numbers that JSON has no word for and half surrogate pairs included."""


def altered(whole: Any, most: int = 3) -> st.SearchStrategy[Any]:
    """`whole` with up to `most` of its values replaced by any JSON, or taken away, or a key added."""
    places = _places(whole)
    change = st.tuples(st.sampled_from(places), st.sampled_from(["replace", "replace", "remove", "add"]), KEYS, JSON)
    return st.lists(change, min_size=1, max_size=most).map(lambda changes: _altered(whole, changes))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


def _altered(whole: Any, changes: list[tuple[tuple[Any, ...], str, str, Any]]) -> Any:
    box = {"": json.loads(json.dumps(whole))}
    for path, what, key, value in changes:
        holder: Any = box
        *way, last = ("", *path)
        try:
            for step in way:
                holder = holder[step]
            if what == "replace":
                holder[last] = value
            elif what == "remove":
                del holder[last]
            else:
                holder[last][key] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took that place away
    return box.get("")


SECONDS = 1.0
BYTES = 200_000_000


@contextmanager
def bounded() -> Iterator[None]:
    """Memory that this process may take beyond what it has: an allocation above it is a MemoryError."""
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(cases: Any, reader: Callable[[Any], Any], may_raise: type[Exception], *inputs: st.SearchStrategy) -> None:
    """Give `reader` each of the inputs: it returns or raises `may_raise`, within the limits."""
    count = 0

    @settings(
        max_examples=cases.of(full=20_000, quick=150),
        deadline=None,
        derandomize=not cases.full,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(*inputs))
    def run(data: Any) -> None:
        nonlocal count
        # What is slow is slow each time; a garbage collection comes once.
        assert any(_took(data) < SECONDS for _ in range(4))
        count += 1

    def _took(data: Any) -> float:
        begun = time.process_time()
        try:
            with bounded():
                reader(data)
        except may_raise as error:
            assert len(str(error)) < 10_000
        return time.process_time() - begun

    run()
    cases.done(count)
