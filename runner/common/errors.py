"""The failures that a person can act on, each with its documented exit code, and "did you mean" for their messages.

A message says what is wrong, where (file, line or key) and what to do next. The command line prints it without a
traceback; ``RUNNER_TRACEBACK=1`` shows one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

from runner.common.text import shorten

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_IN_USE = 3
EXIT_DIVERGED = 4
EXIT_DAMAGED = 5
EXIT_MEMORY = 6
EXIT_GPU = 7
EXIT_GAVE_UP = 8
EXIT_RANK_LOST = 9
EXIT_STORAGE = 74
EXIT_INTERRUPTED = 130
"""128 + SIGINT."""
EXIT_REPLACE = 75
"""A supervised process has saved and is to be replaced by a new one; its supervisor alone sees it."""

_MAX_NAME_LENGTH = 200
_MAX_CANDIDATES = 1000


class RunnerError(Exception):
    """A failure that a person can act on; the process exits with ``exit_code``."""

    exit_code = EXIT_FAILED


class ConfigError(RunnerError):
    """Raised for an invalid argument on the command line or an invalid setting in a YAML file."""

    exit_code = EXIT_CONFIG


class DataError(RunnerError):
    """Raised for a data set that cannot be trained on; names file, line and reason."""

    exit_code = EXIT_CONFIG


class ModelError(RunnerError):
    """Raised for a base model or an adapter that cannot be loaded; names what is unsupported or does not fit."""

    exit_code = EXIT_CONFIG


class DirectoryInUse(RunnerError):
    """Raised when another process holds the lock of the run directory."""

    exit_code = EXIT_IN_USE


class Diverged(RunnerError):
    """Raised when the loss or the gradient is no longer finite."""

    exit_code = EXIT_DIVERGED


class NonFiniteUpdate(Diverged):
    """Raised when the loss or the gradient of an update is not finite; the update was not applied."""


class CheckpointError(RunnerError):
    """Raised for a checkpoint or adapter that is missing, damaged or does not fit the run; names it and the reason."""

    exit_code = EXIT_DAMAGED


class OutOfMemory(RunnerError):
    """Raised when the machine or its GPU has no memory left for the run; what was saved before is intact."""

    exit_code = EXIT_MEMORY


class GpuError(RunnerError):
    """Raised when the GPU or its driver aborted the computation; what was saved before is intact."""

    exit_code = EXIT_GPU


class GaveUp(RunnerError):
    """Raised when the process of a supervised run died too often without a new checkpoint."""

    exit_code = EXIT_GAVE_UP


class RankLost(RunnerError):
    """Raised when another rank of the run died, hangs, is cut off or failed; what was saved before is intact."""

    exit_code = EXIT_RANK_LOST

    def __init__(self, message: str, exit_code: int = EXIT_RANK_LOST) -> None:
        """`exit_code`: that of the other rank, where it failed for a reason that it could tell."""
        super().__init__(message)
        self.exit_code = exit_code


class StorageError(RunnerError):
    """Raised when the disk is full, read-only or failing; what was saved before is intact."""

    exit_code = EXIT_STORAGE


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a process that `error` ends."""
    if isinstance(error, RunnerError):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FAILED
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILED


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest of `known`, or the empty string where none is close.

    Only the first thousand candidates and short names are compared: the time grows with the square of the length.
    """
    if len(name) > _MAX_NAME_LENGTH:
        return ""
    candidates = [candidate for candidate in islice(known, _MAX_CANDIDATES) if len(candidate) <= _MAX_NAME_LENGTH]
    closest = difflib.get_close_matches(name, candidates, n=1, cutoff=cutoff)
    return f" Did you mean '{shorten(closest[0])}'?" if closest else ""
