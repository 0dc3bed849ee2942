"""What is carried over from an old config: each old key with our settings, or with the reason why it has none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runner.common.errors import ConfigError
from runner.config import schema, validation
from runner.migrate.old import Old
from runner.migrate.values import Cannot, word

GROUP_DEFAULTS = {"optimizer": "adamw", "schedule": "constant"}
"""The choices of conf/config.yaml."""


@dataclass
class Line:
    """An old key and what becomes of it."""

    key: str
    value: Any
    said: bool
    """Whether the old config says it; else it is a default of the old program that differs from ours."""
    overrides: list[str] = field(default_factory=list)
    """Ours; empty where the value is our default already, or where `note` says what it is here."""
    same: bool = False
    """Our default is the same."""
    note: str = ""


@dataclass
class Left:
    """What cannot be carried over."""

    key: str
    value: Any
    reason: str
    """Why, and what to do."""


class Carried:
    """The result: our groups and settings, and what to say about each old key."""

    def __init__(self, old: Old, our_defaults: bool = False) -> None:
        """`our_defaults`: what the old config does not say is left to our defaults."""
        self.old = old
        self.our_defaults = our_defaults
        self.groups: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.lines: list[Line] = []
        self.left: list[Left] = []
        self.seen: set[str] = set()

    @property
    def overrides(self) -> list[str]:
        """The whole command line after `python -m runner`."""
        return self._words(self.groups | self.values)

    def has(self, key: str) -> bool:
        """Whether `key` is said, or a default of the old program counts."""
        self.seen.add(key)
        return key in self.old.said or (not self.our_defaults and key in self.old.program.defaults)

    def value(self, key: str) -> Any:
        """What holds for `key` there, said or not; null where the program has no default for it."""
        self.seen.add(key)
        return self.old.said.get(key, self.old.program.defaults.get(key))

    def read(self, key: str, kind: Callable[[Any], Any], fallback: Any = None) -> Any:
        """The value of `key` as `kind`; `fallback`, with the reason told, where it is none."""
        try:
            return kind(self.value(key))
        except Cannot as reason:
            self.leave(key, f"{reason}")
            return fallback

    def put(
        self,
        key: str,
        kind: Callable[[Any], Any],
        name: str,
        note: str = "",
        groups: Mapping[str, Any] | None = None,
        value: Any = None,
    ) -> None:
        """Carry `key` over as our setting `name`; with its reason among `left` where it cannot be.

        Args:
            groups: chosen along with it.
            value: in place of the old one, where they differ.
        """
        if not self.has(key):
            return
        try:
            found = kind(self.value(key) if value is None else value)
            self.accept(key, self.value(key), {name: found}, groups or {}, note)
        except Cannot as reason:
            self.leave(key, f"{reason}")

    def accept(
        self,
        key: str,
        old: Any,
        values: Mapping[str, Any],
        groups: Mapping[str, Any] | None = None,
        note: str = "",
        said: bool | None = None,
    ) -> None:
        """Add our settings for `key`.

        Raises:
            Cannot: our own checks refuse them; nothing is added then.
        """
        groups = dict(groups or {})
        problem = self._refused({**self.groups, **groups}, {**self.values, **values})
        if problem:
            raise Cannot(problem)
        new_groups = {g: v for g, v in groups.items() if v != GROUP_DEFAULTS.get(g)}
        self.groups.update(new_groups)
        chosen = self.groups.get("optimizer", "adamw"), self.groups.get("schedule", "constant")
        new = {n: v for n, v in values.items() if v != _default(n, *chosen)}
        self.values.update(new)
        if said is None:
            said = key.partition(".")[0] in self.old.said
        words = self._words(new_groups | new)
        if said or words:
            self.lines.append(Line(key, old, said, words, same=not words, note=note))

    def elsewhere(self, key: str, note: str, value: Any = None) -> None:
        """`key`, where it is said, is no setting here: `note` says what it is instead."""
        self.seen.add(key)
        if key.partition(".")[0] in self.old.said:
            self.lines.append(Line(key, self.old.said[key] if value is None else value, True, note=note))

    def leave(self, key: str, reason: str, value: Any = None) -> None:
        """`key` cannot be carried over."""
        self.seen.add(key)
        self.left.append(Left(key, self.value(key) if value is None else value, reason))

    def check(self) -> None:
        """Raises ConfigError where the whole would be refused; every part was accepted, so it is not."""
        problem = self._refused(self.groups, self.values)
        if problem:
            raise ConfigError(problem)

    @staticmethod
    def _words(settings: Mapping[str, Any]) -> list[str]:
        return [word(name, value) for name, value in settings.items()]

    @staticmethod
    def _refused(groups: Mapping[str, Any], values: Mapping[str, Any]) -> str:
        data: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": "d"}}
        for name in ("optimizer", "schedule"):
            data[name] = {"name": groups.get(name, GROUP_DEFAULTS[name])}
        for name, value in values.items():
            *sections, last = name.split(".")
            place = data
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
        try:
            validation.validate(schema.from_dict(data, "here"))
        except ConfigError as error:
            return " ".join(str(error).split()).rstrip(".")
        return ""


def _default(name: str, optimizer: str, schedule: str) -> Any:
    section, _, option = name.partition(".")
    if name == "lora.scale":
        return schema.DEFAULT_LORA_SCALE
    choice = {"optimizer": optimizer, "schedule": schedule}.get(section, "")
    return schema.choice_options(section, choice).get(option, schema.default_settings()[name])
