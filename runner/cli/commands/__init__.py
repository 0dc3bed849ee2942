"""The verbs: commands over output directories. Each module has `run(argv) -> exit code` and its own --help."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import NoReturn

from runner.common.errors import ConfigError

COMMANDS = {
    "ls": "runs and sweeps: state, step, best metric, age, size, and the settings that differ",
    "show": "one run or sweep: settings that differ from the defaults, curves, checkpoints, how to go on",
    "verify": "is every byte still what was saved? Of checkpoints, runs, sweeps, trees; --replay trains again",
    "test": "loss, perplexity and the data set's metric of a run or checkpoint on the test split",
    "generate": "answer a prompt with a run's adapter, streaming; --compare-base beside the base model",
    "export": "a run as an mlx-lm adapter folder or as a fused model",
    "import": "an mlx_lm.lora config or command line as our overrides",
}
"""Verb to what it does; the module `runner.cli.commands.NAME` is imported when it is called (`import_` for import)."""


class CommandParser(argparse.ArgumentParser):
    """An argparse parser whose errors are sentences with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of exiting."""
        raise ConfigError(f"{self.prog}: {message}. python -m {self.prog} --help says more.")


def run_command(verb: str, argv: Sequence[str]) -> int:
    """Run `verb` with its words; returns the exit code.

    Raises:
        RunnerError: a sentence for the door.
    """
    module = importlib.import_module(f"runner.cli.commands.{'import_' if verb == 'import' else verb}")
    code: int = module.run(list(argv))
    return code
