"""Arguments and output that the commands on an adapter (test, generate, export) share."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from typing import Any

from runner.cli.commands import COMMANDS, CommandParser
from runner.common.errors import ConfigError
from runner.common.text import printable
from runner.config.schema import Config

_OVERRIDES_HELP = (
    "settings to change, key=value: data=NAME, data.path=…, model.path=…, model.dtype=…, train.batch_size=…"
)


class AdapterParser(CommandParser):
    """A parser with RUN, --checkpoint, --any-base and --json; `parse` also allows overrides among the options."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"runner {command}", description=COMMANDS[command])
        self.add_argument("run", metavar="RUN", help="run directory, its adapters/, or a checkpoint (step-0000100)")
        self.add_argument(
            "--checkpoint", metavar="last|best|STEP", help="one of the run's checkpoints instead of its result"
        )
        self.add_argument(
            "--any-base", action="store_true", help="accept a base model with other weights than it was trained on"
        )
        self.add_argument("--json", action="store_true", help="one JSON document on standard output")

    def parse(self, argv: list[str]) -> Namespace:
        """Parse `argv`, with the overrides as `overrides`; a prompt that looks like an option comes after `--`."""
        self.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help=_OVERRIDES_HELP)
        if "--" in argv or any(argument in ("-h", "--help") for argument in argv):
            return self.parse_args(argv)
        return self.parse_intermixed_args(argv)


def compose_run(command: str, overrides: list[str]) -> Config:
    """Return the config of the run that `overrides` describe, for a command that only looks at it.

    Raises:
        RunnerError: a wrong override, or not those of one new run.
    """
    from runner.cli.overrides import parse_arguments

    invocation = parse_arguments(overrides)
    if invocation.multirun or invocation.resume:
        raise ConfigError(f"runner {command} takes the settings of one new run: no -m and no resume=.")
    from runner.app import compose
    from runner.app.resolve import resolve_config

    with compose.open_session(invocation) as session:
        return resolve_config(compose.without_hydra(session.compose()))


def print_note(line: str) -> None:
    """Print a line to standard error, so that standard output holds the result alone."""
    print(printable(line), file=sys.stderr, flush=True)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document; characters outside ASCII are escaped, so that no text can control a terminal."""
    print(json.dumps(document, indent=1))
