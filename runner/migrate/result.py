"""The result of an import: what each setting of the other program becomes here, or why it has no equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runner.common.errors import ConfigError
from runner.config import schema, serialize, validation
from runner.config.quoting import quote_value
from runner.migrate.convert import CannotImport
from runner.migrate.source import SourceConfig

GROUP_DEFAULTS = {"optimizer": "adamw", "schedule": "constant"}
"""The choices of conf/config.yaml."""

Convert = Callable[[Any], Any]
"""Converts a value to the type of our setting, or raises CannotImport."""


@dataclass
class ImportedSetting:
    """A setting of the other program and what it becomes here."""

    key: str
    value: Any
    explicit: bool
    """Whether the source sets it; else it is a default of the other program that differs from ours."""
    overrides: list[str] = field(default_factory=list)
    """Ours; empty where our default is the same, or where `note` says what there is instead."""
    same: bool = False
    """Whether our default is the same."""
    note: str = ""


@dataclass
class SkippedSetting:
    """A setting of the other program that has no equal here."""

    key: str
    value: Any
    reason: str
    """Why, and what to do."""


class ImportResult:
    """Our groups and settings, and what to report on each setting of the source."""

    def __init__(self, source: SourceConfig, our_defaults: bool = False) -> None:
        """Start with nothing imported; with `our_defaults`, the defaults of the other program are not imported."""
        self.source = source
        self.our_defaults = our_defaults
        self.groups: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.imported: list[ImportedSetting] = []
        self.skipped: list[SkippedSetting] = []
        self.handled: set[str] = set()

    @property
    def overrides(self) -> list[str]:
        """The arguments of `python -m runner`."""
        return _overrides(self.groups | self.values)

    def applies(self, key: str) -> bool:
        """Return whether the source sets `key`, or a default of its program is to be imported."""
        self.handled.add(key)
        return key in self.source.settings or (not self.our_defaults and key in self.source.program.defaults)

    def value(self, key: str) -> Any:
        """Return the value of `key` in the source or its program's default, None where there is none."""
        self.handled.add(key)
        return self.source.settings.get(key, self.source.program.defaults.get(key))

    def read(self, key: str, convert: Convert, fallback: Any = None) -> Any:
        """Return the converted value of `key`; `fallback`, with the reason reported, where it is invalid."""
        try:
            return convert(self.value(key))
        except CannotImport as reason:
            self.skip(key, str(reason))
            return fallback

    def import_key(
        self,
        key: str,
        convert: Convert,
        name: str,
        note: str = "",
        groups: Mapping[str, Any] | None = None,
    ) -> None:
        """Import `key` as our setting `name`, with the choices of `groups`, or report why it cannot be."""
        if self.applies(key):
            self.import_value(key, self.value(key), convert, name, note, groups)

    def import_value(
        self,
        key: str,
        found: Any,
        convert: Convert,
        name: str,
        note: str = "",
        groups: Mapping[str, Any] | None = None,
    ) -> None:
        """Import the value `found` under `key` as our setting `name`; see `import_key`."""
        try:
            self.add(key, found, {name: convert(found)}, groups, note)
        except CannotImport as reason:
            self.skip(key, str(reason), found)

    def add(
        self,
        key: str,
        found: Any,
        values: Mapping[str, Any],
        groups: Mapping[str, Any] | None = None,
        note: str = "",
        explicit: bool | None = None,
    ) -> None:
        """Add our settings and groups for `key`, whose value in the source is `found`.

        Raises:
            CannotImport: our validation refuses them; nothing is added.
        """
        groups = dict(groups or {})
        if problem := _problem({**self.groups, **groups}, {**self.values, **values}):
            raise CannotImport(problem)
        new_groups = {group: choice for group, choice in groups.items() if choice != GROUP_DEFAULTS.get(group)}
        self.groups.update(new_groups)
        new_values = {name: value for name, value in values.items() if value != self._default(name)}
        self.values.update(new_values)
        if explicit is None:
            explicit = key.partition(".")[0] in self.source.settings
        overrides = _overrides(new_groups | new_values)
        if explicit or overrides:
            self.imported.append(ImportedSetting(key, found, explicit, overrides, same=not overrides, note=note))

    def explain(self, key: str, note: str, value: Any = None) -> None:
        """Report what there is here instead of a setting for `key`, if the source sets it."""
        self.handled.add(key)
        if key.partition(".")[0] in self.source.settings:
            found = self.source.settings[key] if value is None else value
            self.imported.append(ImportedSetting(key, found, True, note=note))

    def skip_given(self, key: str, reason: str) -> None:
        """Report that `key` cannot be imported, if the source sets it."""
        if key in self.source.settings:
            self.skip(key, reason)

    def skip(self, key: str, reason: str, value: Any = None) -> None:
        """Report that `key` cannot be imported."""
        self.handled.add(key)
        self.skipped.append(SkippedSetting(key, self.value(key) if value is None else value, reason))

    def validate(self) -> None:
        """Check the whole result. Raises ConfigError, although every part was checked when it was added."""
        if problem := _problem(self.groups, self.values):
            raise ConfigError(problem)

    def _default(self, name: str) -> Any:
        """Return the default of our setting `name` with the choices made so far."""
        if name == "lora.scale":
            return validation.lora_scale(schema.LoraConfig())
        section, _, option = name.partition(".")
        choice = (GROUP_DEFAULTS | self.groups).get(section)
        options = schema.choice_options(section, choice) if isinstance(choice, str) else {}
        return options.get(option, serialize.default_settings()[name])


def _overrides(settings: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}={value if _is_quoted_later(name, value) else quote_value(value)}" for name, value in settings.items()
    ]


def _is_quoted_later(name: str, value: Any) -> bool:
    """Return whether the command line quotes `value` itself, as it does with paths that are typed as they are."""
    return name in schema.path_settings() and value != "null" and value[0] not in "'\"[~"


def _problem(groups: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Return why our validation refuses the settings; empty where it does not."""
    config: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": "d"}}
    for name in GROUP_DEFAULTS:
        config[name] = {"name": groups.get(name, GROUP_DEFAULTS[name])}
    for name, value in values.items():
        *sections, last = name.split(".")
        section = config
        for section_name in sections:
            section = section.setdefault(section_name, {})
        section[last] = value
    try:
        validation.validate(serialize.from_dict(config, "here"))
    except ConfigError as error:
        return " ".join(str(error).split()).rstrip(".")
    return ""
