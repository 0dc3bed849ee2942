"""What the schema states of a setting beside its type and its docstring: bounds, choices, resume, paths, display.

`setting()` puts it into the field's metadata; validation, the resume policy, the command line, the import of other
programs' configs, the reports and the documentation read it there.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from runner.common import layout

MISSING = "???"
"""Default of a setting that a group has to set (OmegaConf's own mark)."""
_METADATA = "runner"
# Names that the run directory has other uses for; compared without case, which some file systems fold.
_RESERVED_NAMES = {
    layout.RESULT,
    layout.LOG,
    layout.CONFIG,
    layout.STATUS,
    layout.METRICS,
    layout.SAMPLES,
    layout.ROW_LOSSES,
    layout.REPORT,
    layout.BACKUP,
    layout.LABELS,
}


class OnResume(Enum):
    """What a resumed run may do with a setting."""

    FROZEN = "frozen"
    """Must stay: it decides the path of the run."""
    FREE = "free"
    """May change; the change is logged."""
    PROVENANCE = "provenance"
    """Records where the settings came from: not compared on resume; a resume keeps it, a repeat does not."""
    LABEL = "label"
    """What a person calls the run: kept in labels.json instead of config.yaml, so that nothing is compared with it."""


class PathKind(Enum):
    """What kind of path a setting is."""

    INPUT = "input"
    """A file or folder that is read, or a hub id or builtin:NAME: absolute where it exists."""
    OUTPUT = "output"
    """A folder that is written: always absolute."""
    RUN_SUBFOLDER = "run subfolder"
    """The name of a folder inside the run directory."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Metadata of a setting. Bounds hold for each item of a list; null passes where the type allows it."""

    choices: tuple[str | int, ...] = ()
    several: bool = False
    """Whether a list of choices is valid beside a single one."""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    minus_one_is_all: bool = False
    """Whether -1 is valid beside what the bounds allow, and means all."""
    length: int | None = None
    """Number of items of a list."""
    path: PathKind | None = None
    on_resume: OnResume = OnResume.FROZEN
    added_later: bool = False
    """Of a frozen setting: that earlier versions did what its default does. With the default it is no part of a run's
    identity, so that their runs can be resumed."""
    defaults_by: Mapping[str, Any] = field(default_factory=dict)
    """For an option that only some optimizers or schedules have: their names, each with the option's default there."""
    report_order: int = 100
    """Place in reports: sections and settings with a lower number come first."""
    shown_as_result_setting: bool = False
    """Whether reports list it among the settings that decide the result, as they do every frozen setting."""
    always_shown: bool = False
    """Whether reports show it even where it has its default."""
    short_names: bool = False
    """Of a section: whether reports leave its name out where the last part of a setting's name is unique."""

    def requirement(self) -> str:
        """Return what a value must be, as the end of a sentence that begins "must be"; empty without bounds."""
        if self.choices:
            several = ", or a list of them" if self.several else ""
            return f"one of {', '.join(map(str, self.choices))}{several}"
        upper = f"below {self.below:,}" if self.below is not None else ""
        if self.at_least is not None:
            upper = upper or (f"{self.at_most:,}" if self.at_most is not None else "")
            text = f"from {self.at_least:,} to {upper}" if upper else f"{self.at_least:,} or more"
        else:
            upper = upper or (f"at most {self.at_most:,}" if self.at_most is not None else "")
            lower = f"above {self.above:,}" if self.above is not None else ""
            text = " and ".join(filter(None, (lower, upper)))
        if self.minus_one_is_all:
            text = f"-1 (all), or {text}"
        return f"{self.length} numbers {text}" if self.length else text

    def accepts(self, value: Any) -> bool:
        """Return whether `value`, of the setting's type and not null, is one of the choices and within the bounds."""
        if self.several and isinstance(value, list):
            return bool(value) and all(item in self.choices for item in value)
        if self.choices:
            return value in self.choices
        if isinstance(value, list):
            return self.length in (None, len(value)) and all(self._within_bounds(item) for item in value)
        return (self.minus_one_is_all and value == -1) or self._within_bounds(value)

    def _within_bounds(self, value: Any) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def setting(default: Any, **metadata: Any) -> Any:
    """Return the dataclass field of a setting with its default and the arguments of `Setting`."""
    found = {_METADATA: Setting(**metadata)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=found)
    return field(default=default, metadata=found)


def section(config_class: type, **metadata: Any) -> Any:
    """Return the dataclass field of a section whose settings have their defaults."""
    return field(default_factory=config_class, metadata={_METADATA: Setting(**metadata)})


def metadata_of(dataclass_field: dataclasses.Field[Any]) -> Setting:
    """Return the metadata that `setting` or `section` gave the field."""
    metadata = dataclass_field.metadata.get(_METADATA, Setting())
    assert isinstance(metadata, Setting)
    return metadata


def absolute_path(text: str, kind: PathKind) -> str:
    """Return an output path absolute; an input path only where it exists, since it may be a hub id or builtin:NAME."""
    expanded = os.path.expanduser(text)
    return os.path.abspath(expanded) if kind is PathKind.OUTPUT or os.path.exists(expanded) else text


def is_valid_path(text: str, kind: PathKind) -> bool:
    """Return whether the operating system accepts `text` as a path; of a run subfolder, whether the name is free."""
    if kind is PathKind.RUN_SUBFOLDER:
        return bool(re.fullmatch(r"\w[\w.-]*", text)) and text.lower() not in _RESERVED_NAMES
    size = len(text.encode(errors="surrogatepass"))
    longest = max(len(part.encode(errors="surrogatepass")) for part in text.split("/"))
    unknown_user = text.startswith("~") and os.path.expanduser(text) == text
    return size < 4000 and longest <= 255 and min(text, default=" ") >= " " and not unknown_user
