"""Writes docs/config.md from the schema and conf/, and checks that it is in step: `python -m runner.docs [--check]`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runner.config import resume_policy, schema
from runner.config.groups import CONF_DIR, group_choices

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "config.md"
_INTRO = """\
# Settings

Every setting can be typed as `section.key=value`, set in a YAML of your own (`--config-dir`), or chosen with a group.
This page is made from the schema (`runner/config.py`) and `conf/` by `python -m runner.docs`.

A resumed run refuses a change of a setting marked *frozen*: it decides the path of the run. The others apply on
resume and are logged ([resume.md](resume.md)).

## Groups"""


def documented_settings(cls: type = schema.Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every setting as (dotted name, default, its documentation line), read from the source of the schema."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    doc: dict[str, str] = {}
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(node.target, ast.Name)
            doc[node.target.id] = str(after.value.value)
    default = cls()
    for f in dataclasses.fields(cls):
        value = getattr(default, f.name)
        if dataclasses.is_dataclass(value):
            yield from documented_settings(type(value), f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", value, " ".join(doc[f.name].split())


def reference_page() -> str:
    """The whole page."""
    out = [_INTRO]
    for group in schema.GROUPS:
        out += [f"\n### {group}\n", f"| `{group}=` | what it is |", "|---|---|"]
        for choice in group_choices(group):
            out.append(f"| `{choice}` | {_about(group, choice)} |")
    out.append("\n## Settings by section\n")
    section = None
    for name, default, doc in documented_settings():
        here = name.split(".")[0] if "." in name else "run"
        if here != section:
            section = here
            out += [f"\n### {here}\n", "| setting | default | on resume | meaning |", "|---|---|---|---|"]
        free = "" if resume_policy.is_free_on_resume(name) else "frozen"
        out.append(f"| `{name}` | {_shown(name, default)} | {free} | {doc} |")
    return "\n".join(out) + "\n"


def main(argv: Sequence[str]) -> int:
    """Write the page, or with --check compare it; returns the exit code."""
    text = reference_page()
    if "--check" in argv:
        if PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE} is out of step with the code: run python -m runner.docs", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


def _about(group: str, choice: str) -> str:
    """The description after the command on top of a choice's YAML."""
    text = (CONF_DIR / group / f"{choice}.yaml").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("# python -m runner"))
    command, _, about = line.removeprefix("# ").partition("      ")
    extra = re.sub(rf"^python -m runner {group}={re.escape(choice)} ?", "", command)
    return f"{about}" + (f" (with `{extra}`)" if extra else "")


def _shown(name: str, default: object) -> str:
    if default == schema.MISSING:
        return "by its group"
    by_choice = schema.metadata()[name].defaults_by
    if by_choice:
        return ", ".join(f"`{_plain(value)}` ({choice})" for choice, value in by_choice.items())
    return f"`{_plain(default)}`"


def _plain(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
