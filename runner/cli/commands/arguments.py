"""What the verbs that load an adapter have in common: the words that name it, and how they speak."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from runner.cli.commands import CommandParser
from runner.common.text import printable

OVERRIDES_HELP = (
    "settings to change, key=value: data=NAME, data.path=…, model.path=…, model.dtype=…, train.batch_size=…"
)


def adapter_parser(verb: str, description: str) -> CommandParser:
    """A parser with RUN, --checkpoint, --any-base and --json."""
    made = CommandParser(prog=f"runner {verb}", description=description)
    made.add_argument("run", metavar="RUN", help="run directory, its adapters/, or a checkpoint (step-0000100)")
    made.add_argument(
        "--checkpoint",
        metavar="last|best|STEP",
        help="one of the run's checkpoints instead of its result",
    )
    made.add_argument("--any-base", action="store_true", help="take a base of other weights than it was trained on")
    made.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return made


def parse_arguments(made: CommandParser, argv: list[str]) -> Namespace:
    """The words, settings among the options allowed; a prompt that looks like an option comes after `--`."""
    if "--" in argv or any(word in ("-h", "--help") for word in argv):
        return made.parse_args(argv)
    return made.parse_intermixed_args(argv)


def print_note(line: str) -> None:
    """A line beside the result: standard output stays the result's own."""
    print(printable(line), file=sys.stderr, flush=True)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document; what is not ASCII is escaped, so that no text can steer a terminal."""
    print(json.dumps(document, indent=1))
