"""Arguments and output that the commands on an adapter (test, generate, export) share."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from typing import Any

from runner.cli.commands import COMMANDS, CommandParser
from runner.common.errors import ConfigError
from runner.common.text import printable
from runner.config.schema import Config

_OVERRIDES_HELP = (
    "settings to change, key=value: data=NAME, data.path=…, model.path=…, model.dtype=…, train.batch_size=…"
)


class AdapterParser(CommandParser):
    """A parser with RUN, --checkpoint, --any-base and, unless the command has no data to print, --json.

    `parse` also allows overrides among the options.
    """

    def __init__(self, command: str, *, has_json: bool = True) -> None:
        super().__init__(prog=f"runner {command}", description=COMMANDS[command])
        self.add_argument("run", metavar="RUN", help="run directory, its adapters/, or a checkpoint (step-0000100)")
        self.add_argument(
            "--checkpoint", metavar="last|best|STEP", help="one of the run's checkpoints instead of its result"
        )
        self.add_argument(
            "--any-base", action="store_true", help="accept a base model with other weights than it was trained on"
        )
        if has_json:
            self.add_argument("--json", action="store_true", help="one JSON document on standard output")

    def add_max_tokens(self, default: int) -> None:
        """Add --max-tokens."""
        self.add_argument(
            "--max-tokens",
            type=number(int, lambda n: n >= 1, "1 or more"),
            default=default,
            metavar="N",
            help=f"longest answer, in tokens (default: {default})",
        )

    def add_sampling(self) -> None:
        """Add the options of mlx-lm's sampler, with defaults that always choose the likeliest token."""
        self.add_argument(
            "--temp",
            type=number(float, lambda t: 0 <= t < 1000, "0 or more"),
            default=0.0,
            metavar="T",
            help="temperature; 0 always chooses the likeliest token (default: 0)",
        )
        self.add_argument(
            "--top-p",
            type=number(float, lambda p: 0 < p <= 1, "above 0, up to 1"),
            default=1.0,
            metavar="P",
            help="sample from the likeliest tokens that hold this much probability (default: 1, all)",
        )
        self.add_argument(
            "--top-k",
            type=number(int, lambda k: k >= 0, "0 or more"),
            default=0,
            metavar="K",
            help="sample from the K likeliest tokens (default: 0, all)",
        )
        self.add_argument(
            "--min-p",
            type=number(float, lambda p: 0 <= p <= 1, "between 0 and 1"),
            default=0.0,
            metavar="P",
            help="sample from tokens with at least this share of the likeliest one's probability (default: 0, all)",
        )

    def add_seed(self) -> None:
        """Add --seed."""
        self.add_argument("--seed", type=number(int, lambda s: 0 <= s < 2**63, "0 or more"), default=0, metavar="N")

    def parse(self, argv: list[str]) -> Namespace:
        """Parse `argv`, with the overrides as `overrides`; a prompt that looks like an option comes after `--`."""
        self.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help=_OVERRIDES_HELP)
        if "--" in argv or any(argument in ("-h", "--help") for argument in argv):
            return self.parse_args(argv)
        return self.parse_intermixed_args(argv)


def number(kind: type, is_valid: Callable[[Any], bool], requirement: str) -> Callable[[str], Any]:
    """Return an argparse type: a number that `is_valid` accepts."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise ArgumentTypeError(f"{text} is invalid: must be {requirement}")
        return value

    return parse


def make_sampler(options: Namespace) -> Callable[[Any], Any]:
    """Return mlx-lm's sampler for the options of `AdapterParser.add_sampling`."""
    from mlx_lm import sample_utils

    return sample_utils.make_sampler(temp=options.temp, top_p=options.top_p, top_k=options.top_k, min_p=options.min_p)


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
