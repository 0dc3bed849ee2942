"""Generate docs/config.md and the defaults in conf/ from the schema: `python -m runner.config.reference [--check]`.

Everything comes from the schema: names, defaults, bounds, choices, and the docstrings of the fields.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config import resume_policy, schema
from runner.config.groups import CONF_DIR, group_choices
from runner.config.invocation import Invocation
from runner.config.setting import Setting, metadata_of

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "config.md"
SHOWN: dict[str, dict[str, Any]] = {
    "model/smollm2_135m": {"path": "builtin:smollm2_135m"},
    "data/text_to_sql": {"path": "builtin:text_to_sql", "metric": "execution_accuracy"},
    "lora/all_linear": {},
    "train/default": {},
    "checkpoint/default": {},
    **{f"optimizer/{name}": {"name": name} for name in schema.metadata()["optimizer.name"].choices},
    **{f"schedule/{name}": {"name": name} for name in schema.metadata()["schedule.name"].choices},
}
"""Choices whose YAML shows every setting of the group, with the values that differ from the schema's defaults."""
UNGROUPED = ("seed", "adapter", "objective")
"""Settings and sections that conf/config.yaml shows, because they belong to no group."""

_WIDTH = 110
_GENERATED = "# All settings of this choice with their defaults, from the schema (python -m runner.config.reference)"
_BEGIN = "# Settings that belong to no group, with their defaults, from the schema (python -m runner.config.reference)"
_END = "# End of the generated settings."
_INTRODUCTION = """\
# Settings

Every setting can be typed as `section.key=value`, set in a YAML file of your own (`--config-dir`), or chosen with a
group. This page is generated from the schema (`runner/config/schema.py`) and `conf/` by
`python -m runner.config.reference`.

A resumed run refuses to change a setting marked *frozen*, because it decides the path of the run. The other settings
apply on resume, and changes are logged ([resume.md](resume.md)).

## Groups"""
_INVOCATION = """
## Arguments of one invocation

Typed like settings, but not stored in `config.yaml`, so that no later resume or repeat inherits them.

| argument | meaning |
|---|---|"""
_INVOCATION_FIELDS = {"resume": "resume=DIR", "repeat": "repeat=DIR", "stop_at": "train.stop_at=N"}


@dataclass(frozen=True)
class DocumentedField:
    """A setting or a section of the schema with its documentation."""

    name: str
    """The last part of its dotted name."""
    default: Any
    """The default of a setting, the dataclass of a section."""
    doc: str
    metadata: Setting

    @property
    def is_section(self) -> bool:
        """Whether it holds other settings."""
        return isinstance(self.default, type)


def documented_fields(config_class: type) -> list[DocumentedField]:
    """Return the fields of a dataclass of the schema, in order; a section is documented by its own docstring."""
    docs, defaults = field_docstrings(config_class), config_class()
    found = []
    for f in dataclasses.fields(config_class):
        value = getattr(defaults, f.name)
        if dataclasses.is_dataclass(value):
            nested = type(value)
            found.append(DocumentedField(f.name, nested, " ".join((nested.__doc__ or "").split()), metadata_of(f)))
        else:
            found.append(DocumentedField(f.name, value, docs[f.name], metadata_of(f)))
    return found


def documented_settings(config_class: type = schema.Config, prefix: str = "") -> Iterator[tuple[str, DocumentedField]]:
    """Yield the dotted name and the field of every setting."""
    for found in documented_fields(config_class):
        if found.is_section:
            yield from documented_settings(found.default, f"{prefix}{found.name}.")
        else:
            yield f"{prefix}{found.name}", found


def field_docstrings(config_class: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, on one line, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(node.target, ast.Name) and isinstance(following.value, ast.Constant)
            docs[node.target.id] = " ".join(str(following.value.value).split())
    return docs


def choice_file(group: str, choice: str, header: str) -> str:
    """Return the YAML of a choice that shows its settings, below the `header` lines that describe it."""
    values = SHOWN[f"{group}/{choice}"]
    section = next(found for found in documented_fields(schema.Config) if found.name == group)
    lines = [*header.splitlines(), _GENERATED, "", *_yaml_lines(section.default, choice, values)]
    return "\n".join(lines) + "\n"


def root_file(text: str) -> str:
    """Return conf/config.yaml, whose present content is `text`, with the settings that belong to no group."""
    before, _, rest = text.partition(f"{_BEGIN}\n")
    after = rest.partition(f"{_END}\n")[2]
    shown = [found for found in documented_fields(schema.Config) if found.name in UNGROUPED]
    lines = [line for found in shown for line in _field_lines(found, "", {}, "")]
    return "\n".join([f"{before}{_BEGIN}", *lines, _END]) + "\n" + after


def reference_page() -> str:
    """Return the content of docs/config.md."""
    lines = [_INTRODUCTION]
    for group in schema.GROUPS:
        lines += [f"\n### {group}\n", f"| `{group}=` | what it is |", "|---|---|"]
        lines += [f"| `{choice}` | {_description(group, choice)} |" for choice in group_choices(group)]
    docs = field_docstrings(Invocation)
    lines += [_INVOCATION, *(f"| `{text}` | {docs[name]} |" for name, text in _INVOCATION_FIELDS.items())]
    lines.append("\n## Settings by section")
    sections: dict[str, list[tuple[str, DocumentedField]]] = {}
    for name, found in documented_settings():
        sections.setdefault(name.split(".")[0] if "." in name else "run", []).append((name, found))
    for title, settings in sections.items():
        lines += [f"\n### {title}\n", "| setting | default | values | on resume | meaning |", "|---|---|---|---|---|"]
        lines += [_table_row(name, found) for name, found in settings]
    return "\n".join(lines) + "\n"


def generated_files() -> dict[Path, str]:
    """Return the content of every generated file."""
    files = {PAGE: reference_page()}
    for name in SHOWN:
        path, (group, choice) = CONF_DIR / f"{name}.yaml", name.split("/")
        header = re.match(r"(#[^\n]*\n)+?(?=# All settings|[^#]|$)", path.read_text(encoding="utf-8"))
        assert header is not None, f"{path} has to begin with a comment: # python -m runner {group}={choice}"
        files[path] = choice_file(group, choice, header[0].rstrip("\n"))
    root = CONF_DIR / "config.yaml"
    files[root] = root_file(root.read_text(encoding="utf-8"))
    return files


def main(arguments: Sequence[str]) -> int:
    """Write the generated files, or with --check compare them with those there are; returns the exit code."""
    files = generated_files()
    stale = [path for path, text in files.items() if path.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path} differs from the schema: run python -m runner.config.reference", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
        print(f"wrote {path}")
    return 0


def _yaml_lines(config_class: type, choice: str, values: dict[str, Any], indent: str = "") -> list[str]:
    """Return the settings of a section as commented YAML, without the options that `choice` does not use."""
    lines = []
    for found in documented_fields(config_class):
        if not found.metadata.defaults_by or choice in found.metadata.defaults_by:
            lines += _field_lines(found, choice, values, indent)
    return lines


def _field_lines(found: DocumentedField, choice: str, values: dict[str, Any], indent: str) -> list[str]:
    values_text = _values_text(found) if found.metadata.choices or found.metadata.minus_one_is_all else ""
    comment = textwrap.wrap(f"{found.doc} {values_text}", _WIDTH - len(indent), break_on_hyphens=False)
    lines = [f"{indent}# {line}" for line in comment]
    if found.is_section:
        return [*lines, f"{indent}{found.name}:", *_yaml_lines(found.default, choice, {}, f"{indent}  ")]
    value = values.get(found.name, found.metadata.defaults_by.get(choice, found.default))
    return [*lines, f"{indent}{found.name}: {_yaml(value)}"]


def _values_text(found: DocumentedField) -> str:
    """Return the bounds or choices of a setting as a sentence; empty where its type says it all."""
    requirement = found.metadata.requirement()
    return f"{requirement[0].upper()}{requirement[1:]}." if requirement else ""


def _table_row(name: str, found: DocumentedField) -> str:
    on_resume = "" if resume_policy.is_free_on_resume(name) else "frozen"
    return f"| `{name}` | {_default_text(found)} | {_values_text(found)} | {on_resume} | {found.doc} |"


def _default_text(found: DocumentedField) -> str:
    if found.default == schema.MISSING:
        return "by its group"
    if found.metadata.defaults_by:
        return ", ".join(f"`{_yaml(value)}` ({choice})" for choice, value in found.metadata.defaults_by.items())
    return f"`{_yaml(found.default)}`"


def _description(group: str, choice: str) -> str:
    """Return the description behind the command on top of a choice's YAML."""
    text = (CONF_DIR / group / f"{choice}.yaml").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("# python -m runner"))
    command, _, description = line.removeprefix("# ").partition("      ")
    extra = re.sub(rf"^python -m runner {group}={re.escape(choice)} ?", "", command)
    return f"{description.strip()}" + (f" (with `{extra}`)" if extra else "")


def _yaml(value: Any) -> str:
    """Return a value as YAML 1.1 reads it, which takes 1e-08 for text."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float) and "e" in repr(value):
        mantissa, exponent = repr(value).split("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+}"
    return "{}" if value == {} else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
