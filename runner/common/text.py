"""Text that is safe to print: control characters replaced, long text cut, paths quoted for the shell."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def printable(text: str) -> str:
    """Replace every character that could control a terminal with a middle dot; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text)


def single_line(text: str) -> str:
    """Return `text` as one printable line."""
    return printable(text.replace("\n", " "))


def first_line(text: str) -> str:
    """Return the first line of `text` that is not blank, without the full stop; empty if there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else ""


def shorten(text: object, limit: int = 200) -> str:
    """Return `text` as one printable line for a message, its middle cut out where it is longer than `limit`."""
    full = str(text)
    cut = full if len(full) <= limit else f"{full[: limit - 20]}…{full[-19:]}"
    return printable(cut).replace("\n", "·")


def count(number: int, noun: str) -> str:
    """Return ``1 row`` or ``2,000 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def relative_path(path: Path) -> str:
    """Return `path` relative to the working directory where it lies below it, else as it is."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def shell_path(path: Path) -> str:
    """Return `relative_path(path)`, quoted for the shell where necessary."""
    return shlex.quote(relative_path(path))


def format_duration(seconds: float) -> str:
    """Format a duration as ``45s``, ``3m20s`` or ``2h05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_bytes(size: int) -> str:
    """Return `size` in bytes as text: ``16.3 MB`` (powers of 1000, as disks are sold)."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{size} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
