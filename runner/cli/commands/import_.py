"""`runner import`: an mlx_lm.lora config or command line, or one of mlx-examples' lora.py, as our overrides."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runner.cli.commands import CommandParser
from runner.common.atomic_io import write_atomically
from runner.common.errors import ConfigError
from runner.common.text import printable
from runner.config.groups import group_choices
from runner.migrate.carry import Carried, Line
from runner.migrate.mapping import carry
from runner.migrate.old import is_program, read_command, read_config
from runner.migrate.values import shown, yaml_value

_COMMAND = ("python", "-m", "runner")
_WIDTH = 100
_EPILOG = """\
  runner import old.yaml                                    of mlx_lm.lora -c old.yaml
  runner import -- mlx_lm.lora --model … --train …          its command line, with or without -c
  runner import -- python lora.py --model … --train         mlx-examples' lora.py
  runner import --write mine/experiment/old.yaml old.yaml   then: runner --config-dir mine experiment=old

What differs in meaning: docs/migrating.md."""


def run(argv: list[str]) -> int:
    """Print what becomes of each old setting and the command to paste; returns 0, also where some have no equal here.

    Raises:
        ConfigError: no config and no known command, one that cannot be read, or a file that cannot be written to.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    words, command = argv[:cut], argv[cut + 1 :]
    if not command and any(is_program(w) for w in words):
        raise ConfigError("Put the command behind --: runner import -- mlx_lm.lora --model … --train")
    said = _parser().parse_args(words)
    if bool(said.config) == bool(command):
        raise ConfigError("runner import takes a YAML of mlx_lm.lora, or behind -- a command line. --help says more.")
    carried = carry(read_command(command) if command else read_config(Path(said.config)), said.our_defaults)
    to_paste = [*_COMMAND, *carried.overrides]
    if said.write:
        to_paste = _write(carried, Path(said.write))
    if said.json:
        print(json.dumps(_document(carried, to_paste), indent=1, ensure_ascii=True, default=str))
    else:
        print("\n".join([*report(carried), "", folded(to_paste)]))
    return 0


def report(carried: Carried) -> list[str]:
    """Each old setting with what becomes of it, as lines for a person."""
    name = carried.old.program.name
    out = [f"from {shown(carried.old.where, 500)} ({name})"]
    for title, said in (
        ("said there", True),
        (f"not said there, where {name} differs from our defaults (--our-defaults leaves these out)", False),
    ):
        lines = [line for line in carried.lines if line.said is said]
        if lines:
            out += ["", title, *_table(lines)]
    if carried.left:
        out += ["", "not carried over"]
        for left in carried.left:
            value = shown(left.value)
            old = f"{shown(left.key)}={value}" if value not in ("", "null") else shown(left.key)
            reason = printable(left.reason)
            out.append(f"  {old}: {reason}{'' if reason[-1] in '.?' else '.'}")
    return [*out, "", "What differs in meaning besides: docs/migrating.md."]


def folded(words: Sequence[str]) -> str:
    """The words quoted for a shell, on lines that end in a backslash."""
    lines = [""]
    for quoted in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + len(quoted) > _WIDTH:
            lines.append("   ")
        lines[-1] += f" {quoted}" if lines[-1] else quoted
    return " \\\n".join(lines)


def experiment(carried: Carried, command: Sequence[str]) -> str:
    """The same as a recipe for conf/experiment/ or a folder of one's own."""
    out = ["# @package _global_", f"# {shown(shlex.join(command), 500)}", f"# from {shown(carried.old.where, 500)}"]
    if carried.groups:
        out.append("defaults:")
        out += [f"  - override /{group}: {yaml_value(choice)}" for group, choice in carried.groups.items()]
    tree: dict[str, Any] = {}
    for name, value in carried.values.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return "\n".join([*out, *_yaml(tree)]) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="runner import",
        description="Turn an old config into our overrides, ready to paste.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="a YAML of mlx_lm.lora -c")
    parser.add_argument("--our-defaults", action="store_true", help="carry over only what the old config says")
    parser.add_argument("--write", metavar="FILE", help="write a recipe, FOLDER/experiment/NAME.yaml, for --config-dir")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    return parser


def _table(lines: Sequence[Line]) -> list[str]:
    old = [f"{shown(line.key)}={shown(line.value)}" for line in lines]
    width = min(44, max(map(len, old)))
    out = []
    for left, line in zip(old, lines, strict=True):
        right = "same as our default" if line.same else " ".join(line.overrides)
        arrow = "->" if line.overrides else "  "
        out.append(f"  {left:<{width}}  {arrow}  {right}".rstrip())
        if line.note and len(out[-1]) + len(line.note) + 4 <= _WIDTH:
            out[-1] += f"  ({line.note})"
        elif line.note:
            out.append(f"      ({printable(line.note)})")
    return out


def _document(carried: Carried, command: Sequence[str]) -> dict[str, Any]:
    return {
        "from": carried.old.where,
        "program": carried.old.program.name,
        "carried": [
            {
                "key": line.key,
                "value": shown(line.value, 1000),
                "said": line.said,
                "overrides": line.overrides,
                "same_as_our_default": line.same,
                "note": line.note,
            }
            for line in carried.lines
        ],
        "not_carried": [
            {"key": shown(left.key), "value": shown(left.value, 1000), "reason": left.reason} for left in carried.left
        ],
        "overrides": carried.overrides,
        "command": shlex.join(command),
    }


def _write(carried: Carried, path: Path) -> list[str]:
    name = path.stem
    if path.suffix != ".yaml" or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ConfigError(f"--write {path}: the file has to be NAME.yaml, the name of letters, digits and _.")
    if path.parent.name != "experiment":
        better = path.parent / "experiment" / path.name
        raise ConfigError(f"--write {path}: a recipe lies in a folder named experiment: --write {better}")
    if name in group_choices("experiment"):
        raise ConfigError(f"--write {path}: experiment={name} is ours already, and ours would be used: choose another.")
    if path.exists():
        raise ConfigError(f"--write {path}: it exists already: choose another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--write {path}: {path.parent} cannot be made: {error.strerror}.") from None
    command = [*_COMMAND, "--config-dir", str(path.parent.parent), f"experiment={name}"]
    write_atomically(path, experiment(carried, command))
    return command


def _yaml(tree: dict[str, Any], indent: str = "") -> list[str]:
    out = []
    for name, value in tree.items():
        if isinstance(value, dict):
            out += [f"{indent}{name}:", *_yaml(value, f"{indent}  ")]
        else:
            out.append(f"{indent}{name}: {yaml_value(value)}")
    return out
