"""The door: `python -m runner …` and `runner …`. Reads the words, answers help at once, hands the rest to Hydra."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from runner.cli.commands import COMMANDS, run_command
from runner.common.errors import EXIT_CONFIG, RunnerError
from runner.common.text import shorten


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    program = os.path.basename(sys.argv[0]) if sys.argv else "runner"
    verb = argv[0] if argv and argv[0] in COMMANDS else None
    if verb is None and any(w in ("--help", "-h", "help") for w in argv):
        from runner.cli.help import help_text

        print(help_text(), end="")
        return 0
    if argv in (["--version"], ["-V"]):
        from runner import __version__

        print(f"runner {__version__}")
        return 0
    try:
        return run_command(verb, argv[1:]) if verb else _start(argv, program)
    except RunnerError as error:
        return _refuse(error, error.exit_code)
    except KeyboardInterrupt:
        if verb is None:
            print("runner: stopped before anything was saved", file=sys.stderr)
        return 130
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from runner.app.errors import translate_error

        explained = translate_error(error)
        return _refuse(explained, explained.exit_code, error)


def _start(argv: list[str], program: str) -> int:
    from runner.cli.overrides import parse_arguments

    said = parse_arguments(argv)
    # Hydra then raises instead of printing its own text, and the sentence is ours.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    from runner.app.run import start

    start(said, program)
    return 0


def _refuse(error: RunnerError, code: int, cause: BaseException | None = None) -> int:
    if os.environ.get("RUNNER_TRACEBACK") == "1":
        traceback.print_exception(cause or error)
    lines = str(error).splitlines() or [type(error).__name__]
    # A message quotes files that others wrote.
    print("\n".join(f"runner: {shorten(line, 2000)}" for line in lines[:100]), file=sys.stderr)
    if code == EXIT_CONFIG and any("There is no setting" in line for line in lines):
        print("runner: all settings: python -m runner --cfg job, or docs/config.md", file=sys.stderr)
    return code
