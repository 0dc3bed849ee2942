"""What can go wrong, as sentences for a person, each with its documented exit code.

Every error says what is wrong, where (file, line or key) and what to do next. The door prints it without a
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
EXIT_STORAGE = 74

_LONGEST_WORD = 200
_MOST_KNOWN = 1000


class RunnerError(Exception):
    """A failure that a person can act on; ``exit_code`` is what the process ends with."""

    exit_code = EXIT_FAILED


class ConfigError(RunnerError):
    """A wrong word on the command line, in a YAML file, or a setting that cannot be used."""

    exit_code = EXIT_CONFIG


class DataError(RunnerError):
    """A data set that cannot be trained on: names file, line and reason."""

    exit_code = EXIT_CONFIG


class ModelError(RunnerError):
    """A base model or an adapter that cannot be loaded: names what is not supported or does not fit."""

    exit_code = EXIT_CONFIG


class DirectoryInUse(RunnerError):
    """Another process holds the run directory's lock."""

    exit_code = EXIT_IN_USE


class Diverged(RunnerError):
    """The loss or the gradient is no longer finite."""

    exit_code = EXIT_DIVERGED


class CheckpointError(RunnerError):
    """A checkpoint is damaged, and there is none to go back to."""

    exit_code = EXIT_DAMAGED


class StorageError(RunnerError):
    """The disk is full, read-only or failing; what was saved before is intact."""

    exit_code = EXIT_STORAGE


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest of `known`, or the empty string where none is near.

    Only among the first thousand, and only short words: the time grows with the square of a length.
    """
    if len(word) > _LONGEST_WORD:
        return ""
    short = (one for one in islice(known, _MOST_KNOWN) if len(one) <= _LONGEST_WORD)
    near = difflib.get_close_matches(word, list(short), n=1, cutoff=0.5)
    return f" Did you mean '{shorten(near[0])}'?" if near else ""
