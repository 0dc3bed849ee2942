"""The command line: `python -m runner …` and `runner …`.

    runner COMMAND …                          a command over output directories, such as ls, show or generate
    runner [group=choice] [setting=value] …   a run; with -m, or where a file says so, a sweep

Exit codes: see `runner.common.errors` and `runner --help`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from runner.cli.commands import COMMANDS, run_command
from runner.common.errors import EXIT_DONE, EXIT_INTERRUPTED, ConfigError, RunnerError
from runner.common.text import shorten
from runner.config.groups import config_dirs

_NO_SWEEP = (
    "Several ranks train one run: leave out -m. In a sweep each job starts its own: -m ranks=2 hydra/launcher=process."
)
_EXIT_SIGPIPE = 141


def main(argv: Sequence[str] | None = None, report_run: Callable[[Path], None] | None = None) -> int:
    """Run the command line `argv` (default: that of this process) and return the exit code.

    Args:
        report_run: given where this process is supervised; see `Invocation`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments, report_run)
    except RunnerError as error:
        return report_error(error, error)
    except KeyboardInterrupt:
        if not _is_command(arguments):
            print("runner: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_SIGPIPE
    except Exception as error:
        from runner.app.errors import translate_error

        return report_error(translate_error(error, [Path(folder) for folder in config_dirs(arguments)]), error)


def _is_command(arguments: list[str]) -> bool:
    return bool(arguments) and arguments[0] in COMMANDS


def _dispatch(arguments: list[str], report_run: Callable[[Path], None] | None) -> int:
    if _is_command(arguments):
        return run_command(arguments[0], arguments[1:])
    if any(argument in ("--help", "-h", "help") for argument in arguments):
        from runner.cli.help import help_text

        print(help_text(), end="")
    elif any(argument in ("--version", "-V") for argument in arguments):
        from runner import __version__

        print(f"runner {__version__}")
    else:
        return _start(arguments, report_run)
    return EXIT_DONE


def _start(arguments: list[str], report_run: Callable[[Path], None] | None) -> int:
    """Start or resume the run or the sweep that `arguments` describe, or print what --cfg and the like ask for."""
    from runner.cli.overrides import parse_arguments
    from runner.distributed.launch import find_launch
    from runner.runs.sweep_manifest import has_sweep_manifest

    invocation = parse_arguments(arguments)  # before Hydra is imported, so that a typo is answered at once
    resumes_sweep = invocation.resume is not None and has_sweep_manifest(invocation.resume)
    # The launcher of a sweep supervises its jobs.
    is_alone = not (resumes_sweep or invocation.multirun or invocation.prints_only)
    invocation.launch = None if invocation.prints_only else find_launch()
    if invocation.launch is not None and not is_alone:
        raise ConfigError(_NO_SWEEP)
    if invocation.supervise and is_alone and report_run is None:
        from runner.cli.supervise import supervise_run

        return supervise_run(arguments, invocation)
    invocation.report_run = report_run
    if invocation.launch is not None and invocation.launch.rank > 0:
        from runner.backends import blas

        blas.load_blas(invocation.launch.local)  # before MLX is imported
        from runner.training.follow import follow

        return follow(invocation.launch, report_run)
    from runner.app import compose, run
    from runner.sweeps import launch

    if resumes_sweep and not invocation.prints_only:
        invocation = launch.resume_sweep(invocation)
    with compose.open_session(invocation) as session:
        if invocation.prints_only:
            session.print_requested()
            return EXIT_DONE
        composed = session.compose()
        if invocation.launch is not None and compose.is_multirun(composed):
            raise ConfigError(_NO_SWEEP)
        start = launch.start_sweep if compose.is_multirun(composed) else run.start_run
        start(invocation, session, composed)
    return EXIT_DONE


def report_error(error: RunnerError, cause: BaseException) -> int:
    """Print `error` to standard error, with the traceback of `cause` if it is asked for; return the exit code."""
    if os.environ.get("RUNNER_TRACEBACK") == "1":
        traceback.print_exception(cause)
    lines = str(error).splitlines() or [type(error).__name__]
    # Bounded and printable: a message may quote files from elsewhere.
    print("\n".join(f"runner: {shorten(line, 2000)}" for line in lines[:100]), file=sys.stderr)
    return error.exit_code
