"""The links of a page that is written elsewhere than into the folder that it is about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.reports.html import sections


def relocated(data: Any, folder: Path, place: Path) -> Any:
    """Return nested `data` of a page with the targets of its links, relative to `folder`, made relative to `place`.

    They become None, which shows their text alone, where the way from `place` would name folders of the machine: where
    neither `folder` lies below `place` nor both below the working directory.
    """
    folder, place = folder.resolve(), place.resolve()
    if folder == place:
        return data
    way = os.path.relpath(folder, place) if _is_harmless(folder, place) else None
    return _converted(data, None if way is None else sections.href(way))


def _is_harmless(folder: Path, place: Path) -> bool:
    """Return whether the way from `place` to `folder` names nothing but folders that the user works in."""
    here, home = Path.cwd().resolve(), Path.home().resolve()
    above = place if folder.is_relative_to(place) else here
    passes_home = home.is_relative_to(above) and home != above  # the way would name the user
    return folder.is_relative_to(above) and place.is_relative_to(above) and not passes_home


def _converted(data: Any, way: str | None) -> Any:
    if isinstance(data, Mapping):
        return {key: _target(value, way) if key == "href" else _converted(value, way) for key, value in data.items()}
    return [_converted(value, way) for value in data] if isinstance(data, (list, tuple)) else data


def _target(target: str | None, way: str | None) -> str | None:
    return None if target is None or way is None else f"{way}/{target.removeprefix('./')}"
