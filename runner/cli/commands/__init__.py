"""The commands over output directories. Each is a module with `run(argv) -> exit code` and its own --help."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import NoReturn

from runner.common.errors import ConfigError

COMMANDS = {
    "ls": "list runs and sweeps, filtered and sorted by metrics and settings, or as a tree of where they come from",
    "best": "print the path of the best run below a folder, or of its best checkpoint, for scripts",
    "show": "show a run or sweep: settings, curves, checkpoints, what to type next",
    "compare": "runs side by side, and whether they differ by more than noise",
    "report": "write a run, a sweep or a folder of them as one HTML page; --watch follows runs in progress",
    "label": "show or change the name, the tags and the note of a run or sweep",
    "clean": "show, and with --yes remove, what is no longer needed: old checkpoints, failed runs, leftovers, caches",
    "verify": "check that every byte is what was saved; --replay also trains again",
    "data": "report on a data set before training: lengths, what is cut and supervised, duplicates",
    "plan": "estimate a run before it starts: memory, time, disk; --fit finds the batch size that fits",
    "test": "measure loss, perplexity and the data set's metric on the test split, or tasks of lm-eval",
    "generate": "answer a prompt with a run's adapter; --base also without it",
    "chat": "talk to a run's adapter; --base answers beside it without it",
    "serve": "answer HTTP requests with a run's adapter, as OpenAI's API does",
    "export": "write a run for mlx-lm, PEFT, llama.cpp or the hub, and check that it computes the same",
    "import": "turn an mlx_lm.lora config or command line into overrides",
}
"""Command to summary; the module `runner.cli.commands.NAME` is imported when it runs (`import_` for import)."""


class CommandParser(argparse.ArgumentParser):
    """An argparse parser that raises its errors as ConfigError."""

    def error(self, message: str) -> NoReturn:
        """Raise `message` as a ConfigError instead of exiting."""
        raise ConfigError(f"{self.prog}: {message}. See python -m {self.prog} --help.")


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run the command `name` with its arguments and return the exit code.

    Raises:
        RunnerError: the command failed, with the message for the user.
    """
    module = importlib.import_module(f"runner.cli.commands.{'import_' if name == 'import' else name}")
    exit_code: int = module.run(list(argv))
    return exit_code
