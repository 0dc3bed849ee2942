"""`runner import`: turn a config or command line of mlx_lm.lora or mlx-examples' lora.py, or an adapter of PEFT, into
overrides."""

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
from runner.config.quoting import yaml_value
from runner.migrate.convert import display
from runner.migrate.mapping import import_config
from runner.migrate.result import ImportedSetting, ImportResult
from runner.migrate.source import is_program, read_command, read_config

_COMMAND = ("python", "-m", "runner")
_WIDTH = 100
_EPILOG = """\
  runner import old.yaml                                    a config of mlx_lm.lora -c
  runner import -- mlx_lm.lora --model … --train …          its command line, with or without -c
  runner import -- python lora.py --model … --train         mlx-examples' lora.py
  runner import FOLDER                                      an adapter of PEFT
  runner import --write mine/experiment/old.yaml old.yaml   then: runner --config-dir mine experiment=old

What differs in meaning: docs/migrating.md."""


def run(argv: list[str]) -> int:
    """Print what becomes of each old setting, and the command that starts the same run here.

    Raises:
        ConfigError: no config and no known command, one that cannot be read, or a file that cannot be written to.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    arguments, old_command = argv[:end], argv[end + 1 :]
    if not old_command and any(is_program(argument) for argument in arguments):
        raise ConfigError("Put the command behind --: runner import -- mlx_lm.lora --model … --train")
    options = _parser().parse_args(arguments)
    if bool(options.config) == bool(old_command):
        raise ConfigError("runner import takes a YAML of mlx_lm.lora, or a command line behind --. See --help.")
    if options.config and Path(options.config).is_dir():
        result = _import_folder(Path(options.config))
    else:
        old = read_command(old_command) if old_command else read_config(Path(options.config))
        result = import_config(old, options.our_defaults)
    command = [*_COMMAND, *result.overrides]
    if options.write:
        command = _write_recipe(result, Path(options.write))
    if options.json:
        print(json.dumps(_to_dict(result, command), indent=1, ensure_ascii=True, default=str))
    else:
        print("\n".join([*report(result), "", wrap_command(command)]))
    return 0


def _import_folder(folder: Path) -> ImportResult:
    from runner.migrate.peft import import_adapter
    from runner.models.peft.config import is_peft_folder

    if not is_peft_folder(folder):
        raise ConfigError(
            f"{folder} is a folder, but no adapter of PEFT. A config of mlx_lm.lora is a file; an adapter of mlx-lm "
            f"needs no import: adapter={folder}"
        )
    return import_adapter(folder)


def report(result: ImportResult) -> list[str]:
    """Return the lines that tell what becomes of each old setting."""
    name = result.source.program.name
    lines = [f"from {display(result.source.origin, 500)} ({name})"]
    for title, is_set in (
        ("set there", True),
        (f"defaults of {name} that differ from ours (--our-defaults leaves these out)", False),
    ):
        settings = [line for line in result.imported if line.explicit is is_set]
        if settings:
            lines += ["", title, *_table(settings)]
    if result.skipped:
        lines += ["", "not carried over"]
        for left in result.skipped:
            value = display(left.value)
            old = f"{display(left.key)}={value}" if value not in ("", "null") else display(left.key)
            reason = printable(left.reason)
            lines.append(f"  {old}: {reason}{'' if reason[-1] in '.?' else '.'}")
    return [*lines, "", "Other differences in meaning: docs/migrating.md."]


def wrap_command(command: Sequence[str]) -> str:
    """Return the command quoted for the shell, on lines that end in a backslash."""
    lines = [""]
    for quoted in map(shlex.quote, command):
        if lines[-1] and len(lines[-1]) + len(quoted) > _WIDTH:
            lines.append("   ")
        lines[-1] += f" {quoted}" if lines[-1] else quoted
    return " \\\n".join(lines)


def recipe(result: ImportResult, command: Sequence[str]) -> str:
    """Return the settings as a recipe for conf/experiment/ or a folder of the user's own; `command` runs it."""
    lines = [
        "# @package _global_",
        f"# {display(shlex.join(command), 500)}",
        f"# from {display(result.source.origin, 500)}",
    ]
    if result.groups:
        lines.append("defaults:")
        lines += [f"  - override /{group}: {yaml_value(choice)}" for group, choice in result.groups.items()]
    tree: dict[str, Any] = {}
    for name, value in result.values.items():
        *sections, last = name.split(".")
        target = tree
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return "\n".join([*lines, *_yaml(tree)]) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="runner import",
        description="Turn an old config or command line into overrides, ready to paste.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="a YAML of mlx_lm.lora -c, or a folder with an adapter of PEFT")
    parser.add_argument("--our-defaults", action="store_true", help="carry over only what the old config says")
    parser.add_argument("--write", metavar="FILE", help="write a recipe, FOLDER/experiment/NAME.yaml, for --config-dir")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    return parser


def _table(lines: Sequence[ImportedSetting]) -> list[str]:
    old = [f"{display(line.key)}={display(line.value)}" for line in lines]
    width = min(44, max(map(len, old)))
    rows = []
    for left, line in zip(old, lines, strict=True):
        right = "same as our default" if line.same else " ".join(line.overrides)
        arrow = "->" if line.overrides else "  "
        rows.append(f"  {left:<{width}}  {arrow}  {right}".rstrip())
        if line.note and len(rows[-1]) + len(line.note) + 4 <= _WIDTH:
            rows[-1] += f"  ({line.note})"
        elif line.note:
            rows.append(f"      ({printable(line.note)})")
    return rows


def _to_dict(result: ImportResult, command: Sequence[str]) -> dict[str, Any]:
    return {
        "from": result.source.origin,
        "program": result.source.program.name,
        "carried": [
            {
                "key": line.key,
                "value": display(line.value, 1000),
                "said": line.explicit,
                "overrides": line.overrides,
                "same_as_our_default": line.same,
                "note": line.note,
            }
            for line in result.imported
        ],
        "not_carried": [
            {"key": display(left.key), "value": display(left.value, 1000), "reason": left.reason}
            for left in result.skipped
        ],
        "overrides": result.overrides,
        "command": shlex.join(command),
    }


def _write_recipe(result: ImportResult, path: Path) -> list[str]:
    """Write the recipe to `path` and return the command that runs it."""
    name = path.stem
    if path.suffix != ".yaml" or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ConfigError(f"--write {path}: must be NAME.yaml, with a name of letters, digits and _.")
    if path.parent.name != "experiment":
        better = path.parent / "experiment" / path.name
        raise ConfigError(f"--write {path}: must lie in a folder named experiment: --write {better}")
    if name in group_choices("experiment"):
        raise ConfigError(
            f"--write {path}: experiment={name} is built in and would be used instead: choose another name."
        )
    if path.exists():
        raise ConfigError(f"--write {path}: it exists already: choose another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--write {path}: {path.parent} cannot be made: {error.strerror}.") from None
    command = [*_COMMAND, "--config-dir", str(path.parent.parent), f"experiment={name}"]
    write_atomically(path, recipe(result, command))
    return command


def _yaml(tree: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in tree.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *_yaml(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name}: {yaml_value(value)}")
    return lines
