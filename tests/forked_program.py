"""The program in a process forked from one that has imported its packages: on Linux a start then takes 20 ms, not 2 s.

What runs is the same code in a process of its own; only the imports are shared. Tests of imports, of signals and of
failing system calls start the program as a user does (`CommandLine.start`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

READ_WHILE_IMPORTING = re.compile(
    r"(PYTHON(?!DONTWRITE)|LD_|FAULT_|OPENBLAS_|OMP_|MKL_|BLIS_|MLX_|HF_|HUGGINGFACE_|TRANSFORMERS_|TOKENIZERS_|HYDRA_|XDG_)"
    r"|(HOME|PATH|TMPDIR|RUNNER_BLAS)$"
)
"""Variables that packages, the interpreter or the dynamic linker read before a command runs."""


class ForkedProgram:
    """Runs commands in forks of one process, which is started by the first of them."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: what the packages are imported with."""
        self._environment = dict(environment)
        self._server: subprocess.Popen[str] | None = None

    def accepts(self, environment: Mapping[str, str]) -> bool:
        """Return whether a command with `environment` would see what it sees in a process of its own."""
        ours, theirs = (
            {name: value for name, value in variables.items() if READ_WHILE_IMPORTING.match(name)}
            for variables in (self._environment, environment)
        )
        return sys.platform == "linux" and ours == theirs

    def run(self, arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str], output: Path) -> int:
        """Run `runner` with `arguments` in `folder`, write what it prints to `output`, and return its exit code.

        As of `subprocess.Popen`, the code of a process that a signal ended is negative.
        """
        request = {
            "arguments": arguments,
            "folder": str(folder),
            "environment": dict(environment),
            "output": str(output),
        }
        server = self._started()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the process that commands are forked from has ended"
        return int(answer)

    def close(self) -> None:
        """End the process that commands are forked from."""
        if self._server is not None:
            self._server.communicate(timeout=60)  # the end of its input ends it

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            command, pipe = [sys.executable, "-P", str(Path(__file__).resolve())], subprocess.PIPE
            self._server = subprocess.Popen(command, env=self._environment, stdin=pipe, stdout=pipe, text=True)
        return self._server


def serve() -> None:
    """Read one request a line, run it in a fork, and write its exit code."""
    from runner.backends import blas

    blas.load_blas()
    import mlx_lm.utils  # noqa: F401
    import transformers

    import runner.app.compose
    import runner.app.run
    import runner.sweeps.launch
    import runner.training.run  # noqa: F401
    from runner.cli.main import main

    assert transformers.AutoTokenizer  # imported when it is asked for
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a fork would lose {threads - 1} threads"
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(request)
            sys.exit(main(request["arguments"]))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(request: Mapping[str, object]) -> None:
    os.chdir(str(request["folder"]))
    sys.path.insert(0, str(request["folder"]))  # as python -m does
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = os.open(str(request["output"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.close(nothing)


if __name__ == "__main__":
    serve()
