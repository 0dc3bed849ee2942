"""Labels of a run or a sweep: a name, tags and a note. Nothing is computed from them; the directory keeps its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runner.common.errors import ConfigError
from runner.common.text import shorten
from runner.config.quoting import quote_text, unquote

SETTINGS = ("name", "tags", "note")
"""The settings that are labels, as the schema has them."""
MAX_NAME_LENGTH = 100
MAX_NOTE_LENGTH = 10_000
MAX_TAGS = 100
_TAG = re.compile(r"\w[\w.:/+@-]{0,63}")


@dataclass(frozen=True)
class Labels:
    """What a person calls a run or a sweep."""

    name: str | None = None
    tags: tuple[str, ...] = ()
    note: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Labels:
        """Return the labels among `settings`, by dotted name, which have passed `problems`."""
        return cls(settings.get("name"), tuple(dict.fromkeys(settings.get("tags") or ())), settings.get("note"))

    @classmethod
    def take(cls, stored: dict[str, Any]) -> Labels:
        """Remove the labels from a config as it is about to be stored, which does not hold them, and return them."""
        return cls.of({name: stored.pop(name, None) for name in SETTINGS})

    def to_dict(self) -> dict[str, Any]:
        """Return the labels as plain data."""
        return {"name": self.name, "tags": list(self.tags), "note": self.note}

    def tagged(self, added: Iterable[str], removed: Iterable[str] = ()) -> tuple[str, ...]:
        """Return the tags with those `added` behind them, without those `removed`."""
        left_out = {*removed}
        return tuple(tag for tag in dict.fromkeys([*self.tags, *added]) if tag not in left_out)

    def without(self, other: Labels) -> Labels:
        """Return what these labels have beside those of `other`."""
        return Labels(
            None if self.name == other.name else self.name,
            tuple(tag for tag in self.tags if tag not in other.tags),
            None if self.note == other.note else self.note,
        )

    @classmethod
    def shared(cls, labels: Iterable[Labels]) -> Labels:
        """Return what all of `labels` have in common."""
        first, *others = list(labels) or [cls()]
        return cls(
            first.name if all(other.name == first.name for other in others) else None,
            tuple(tag for tag in first.tags if all(tag in other.tags for other in others)),
            first.note if all(other.note == first.note for other in others) else None,
        )


NO_LABELS = Labels()


def problems(name: str | None, tags: Iterable[str], note: str | None) -> Iterator[str]:
    """Yield a sentence for each label that is no valid one."""
    if name is not None and (not name.strip() or len(name) > MAX_NAME_LENGTH or not name.isprintable()):
        yield f"name={shorten(name)} is invalid: must be one line of at most {MAX_NAME_LENGTH} characters."
    tags = list(tags)
    yield from (
        f"tags: {shorten(tag)!r} is invalid: a tag is one word of letters, digits and . _ : / + @ -, at most 64 long."
        for tag in tags
        if not is_tag(tag)
    )
    if len(tags) > MAX_TAGS:
        yield f"tags: {len(tags)} tags are too many: at most {MAX_TAGS}."
    if note is not None and len(note) > MAX_NOTE_LENGTH:
        yield f"note is invalid: must have at most {MAX_NOTE_LENGTH:,} characters."


def is_tag(tag: object) -> bool:
    """Return whether `tag` is one word that a tag may be; a reference to another setting is resolved later."""
    return isinstance(tag, str) and (_TAG.fullmatch(tag) is not None or "${" in tag)


def split_tags(text: str) -> list[str]:
    """Return the tags that a person typed: `a`, `a,b` or `[a,b]`."""
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return [unquote(part.strip()) for part in inner.split(",") if part.strip()]


def quote(key: str, value: str) -> str:
    """Return the typed `value` of the label `key` for Hydra's grammar, in which a comma and a blank mean more.

    Raises:
        ConfigError: a tag that is none.
    """
    if "${" in value:
        return value
    if not unquote(value):
        value = "null"
    if key == "tags":
        tags = [] if value == "null" else split_tags(value)
        for problem in problems(None, tags, None):
            raise ConfigError(problem)
        return f"[{','.join(map(quote_text, tags))}]"
    return value if value == "null" or value[:1] in ("'", '"') else quote_text(value)
