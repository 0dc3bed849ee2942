"""Python processes forked from one that has imported the packages: on Linux a start then takes 20 ms, not 2 s.

What runs is the same code in a process of its own, as `python -m MODULE …` or `python SCRIPT …` would run it; only the
imports are shared. Processes of `runner` that it starts itself, such as the workers of a sweep, are forked as well.
Tests of imports and of how a process starts start the program as a user does (`CommandLine.start(…, fork=False)`).
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import json
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READ_WHILE_IMPORTING = re.compile(
    r"(PYTHON(?!DONTWRITE)|LD_|OPENBLAS_|OMP_|MKL_|BLIS_|MLX_(?!RANK$|HOSTFILE$)|HF_|HUGGINGFACE_"
    r"|TRANSFORMERS_|TOKENIZERS_|HYDRA_|XDG_)"
    r"|(HOME|PATH|TMPDIR|RUNNER_BLAS)$"
)
"""Variables that packages, the interpreter or the dynamic linker read before a command runs."""
_REQUEST_BYTES = 1 << 20


def read_while_importing(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the part of `environment` that decides what importing the packages does."""
    return {name: value for name, value in environment.items() if READ_WHILE_IMPORTING.match(name)}


class ForkedProcess:
    """A process with the methods of `subprocess.Popen`; the system does not know it as a child of this one."""

    def __init__(
        self,
        address: str,
        words: Sequence[str | os.PathLike[str]],
        *,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        text: bool = False,
        start_new_session: bool = False,
        process_group: int | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Ask the server at `address` for `python WORDS…`; the options are those of `subprocess.Popen`."""
        self.args = [os.fspath(word) for word in words]
        self.returncode: int | None = None
        self.seconds = 0.0
        """CPU time of the process and its children, once it has ended."""
        self._readers: list[threading.Thread] = []
        self._read: dict[str, Any] = {}
        opened: list[int] = []
        given, self.stdin = _open_end(stdin, 0, opened, text)
        output, self.stdout = _open_end(stdout, 1, opened, text)
        errors, self.stderr = (output, None) if stderr == subprocess.STDOUT else _open_end(stderr, 2, opened, text)
        request = {
            "words": self.args,
            "folder": os.fspath(cwd or os.getcwd()),
            "environment": dict(os.environ if env is None else env),
            "new_session": start_new_session,
            "group": process_group,
            "descriptors": [0, 1, 2, *pass_fds],
        }
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _REQUEST_BYTES)
        self._connection.connect(f"\0{address}")
        socket.send_fds(self._connection, [json.dumps(request).encode()], [given, output, errors, *pass_fds])
        for descriptor in opened:
            os.close(descriptor)
        self.pid = int(self._connection.recv(100))

    def poll(self) -> int | None:
        """Return the exit code, None while it runs, and the negative number of a signal that ended it."""
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit code as `poll` does."""
        code = self._wait(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Return what is left of its output and errors, once nobody can write to them any more."""
        if self.stdin is not None:
            self.stdin.close()
        if not self._readers:
            for name in ("stdout", "stderr"):
                if getattr(self, name) is not None:
                    self._readers.append(threading.Thread(target=self._read_rest, args=(name,), daemon=True))
                    self._readers[-1].start()
        until = time.monotonic() + (1e6 if timeout is None else timeout)
        for reader in self._readers:
            reader.join(max(0.0, until - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(max(1.0, until - time.monotonic()))
        return self._read.get("stdout"), self._read.get("stderr")

    def _read_rest(self, name: str) -> None:
        with getattr(self, name) as file:
            self._read[name] = file.read()

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it is known to have ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send it SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            reply = self._connection.recv(100)
            self._connection.close()
            assert reply, "the process that others are forked from has ended"
            self.returncode, self.seconds = json.loads(reply)
        return self.returncode


def _open_end(asked: Any, own: int, opened: list[int], text: bool) -> tuple[int, Any]:
    """Return the descriptor that is to be `own` in the new process, and this process's end of a pipe to it."""
    if asked is None:
        return own, None
    if asked == subprocess.DEVNULL:
        opened.append(os.open(os.devnull, os.O_RDWR))
        return opened[-1], None
    if asked != subprocess.PIPE:
        return asked if isinstance(asked, int) else asked.fileno(), None
    reading, writing = os.pipe()
    theirs, ours = (reading, writing) if own == 0 else (writing, reading)
    opened.append(theirs)
    return theirs, os.fdopen(ours, ("w" if own == 0 else "r") + ("" if text else "b"))


class ForkedProgram:
    """Starts processes as forks of one, which is started by the first of them."""

    def __init__(self, environment: Mapping[str, str], python: str | os.PathLike[str] = sys.executable) -> None:
        """`environment`: what the packages are imported with."""
        self._environment = dict(environment)
        self._python = os.fspath(python)
        self._server: subprocess.Popen[bytes] | None = None
        self._address = ""

    def accepts(self, environment: Mapping[str, str]) -> bool:
        """Return whether a process with `environment` would see what it sees when it is not forked."""
        return sys.platform == "linux" and read_while_importing(self._environment) == read_while_importing(environment)

    def start(self, *words: str | os.PathLike[str], **options: Any) -> ForkedProcess:
        """Start `python WORDS…`; see `ForkedProcess`."""
        if self._server is None:
            command = [self._python, "-P", str(Path(__file__).resolve())]
            pipe = subprocess.PIPE
            self._server = subprocess.Popen(command, env=self._environment, stdin=pipe, stdout=pipe)
            assert self._server.stdout is not None
            self._address = self._server.stdout.readline().decode().strip()
            assert self._address, "the process that others are forked from has not started"
        return ForkedProcess(self._address, words, **options)

    def close(self) -> None:
        """End the process that others are forked from."""
        if self._server is not None:
            self._server.communicate(timeout=60)  # the end of its input ends it


@dataclass
class Server:
    """What a forked process knows of the one that it was forked from."""

    address: str
    imported_with: dict[str, str]
    """The environment that decided what the imports did."""

    def accepts(self, environment: Mapping[str, str]) -> bool:
        """As `ForkedProgram.accepts`."""
        return read_while_importing(environment) == self.imported_with

    def start(self, *words: str, **options: Any) -> ForkedProcess:
        """As `ForkedProgram.start`."""
        return ForkedProcess(self.address, words, **options)


def serve() -> None:
    """Import the packages, print an address, fork a process for each request there, and tell how it ended."""
    server = Server(f"runner-tests-{os.getpid()}", read_while_importing(os.environ))
    _import_packages()
    if sys.platform == "linux":
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"a fork would lose {threads - 1} threads"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the tests
    gc.collect()
    gc.freeze()  # else each fork would go through all that was imported, and copy it
    requests = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    requests.bind(f"\0{server.address}")
    requests.listen(64)
    print(server.address, flush=True)
    children: dict[int, socket.socket] = {}
    """Who asked for it, by pid."""
    ended, ends = os.pipe()
    os.set_blocking(ends, False)
    signal.set_wakeup_fd(ends)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while True:
        ready = select.select([0, ended, requests], [], [])[0]
        if ended in ready:
            os.read(ended, 4096)
            _tell_ends(children)
        if requests in ready:
            connection, _ = requests.accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _REQUEST_BYTES)
            data, descriptors, _, _ = socket.recv_fds(connection, _REQUEST_BYTES, 16)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for own in (requests, connection, *children.values()):
                    own.close()
                os.close(ended), os.close(ends)
                _end_as(_run, json.loads(data), descriptors, server)
            for descriptor in descriptors:
                os.close(descriptor)
            children[pid] = connection
            with contextlib.suppress(OSError):  # who asked has ended
                connection.send(b"%d" % pid)
        if 0 in ready:
            return


def _tell_ends(children: dict[int, socket.socket]) -> None:
    """Tell the exit code and CPU time of each child that has ended to who asked for it."""
    for pid in list(children):
        found, status, used = os.wait4(pid, os.WNOHANG)
        if found:
            reply = [os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]
            with children.pop(pid) as connection, contextlib.suppress(OSError):
                connection.send(json.dumps(reply).encode())


def _import_packages() -> None:
    from runner.backends import blas

    blas.load_blas()
    import mlx_lm.utils  # noqa: F401
    import transformers

    import runner.app.compose
    import runner.app.run
    import runner.sweeps.launch
    import runner.training.run  # noqa: F401

    assert transformers.AutoTokenizer  # imported when it is asked for


def _run(request: Mapping[str, Any], descriptors: Sequence[int], server: Server) -> None:
    """Become the process that `request` asks for, and run its code to the end."""
    if request["new_session"]:
        os.setsid()
    elif request["group"] is not None:
        os.setpgid(0, request["group"])
    os.chdir(request["folder"])
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 100) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(moved, request["descriptors"], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    _open_standard_streams()
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    subprocess.Popen = popen_that_forks(server)  # type: ignore[misc]
    kind, *arguments = request["words"]
    if kind == "-m":
        name = sys.argv[0] = arguments[0]
        sys.argv[1:] = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[:] = ["-c", *arguments[1:]]
        sys.path.insert(0, "")
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[:] = [kind, *arguments]
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")


def _open_standard_streams() -> None:
    """Make `sys.stdin` and the others as Python does at its start: by line on a terminal, else by block."""
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1 if os.isatty(1) else -1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def popen_that_forks(program: ForkedProgram | Server) -> type[subprocess.Popen[Any]]:
    """Return what can take the place of `subprocess.Popen`: it has `program` start the processes of `runner`."""

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __new__(cls, args: Any, *rest: Any, **options: Any) -> Any:
            known = not rest and set(options) <= _OPTIONS and isinstance(args, list)
            if known and args[:2] == [sys.executable, "-m"] and args[2].startswith("runner."):
                environment = os.environ if options.get("env") is None else options["env"]
                if program.accepts(environment):
                    return program.start(*args[1:], **options)
            return super().__new__(cls)

    return Popen


_OPTIONS = {"cwd", "env", "stdin", "stdout", "stderr", "text", "start_new_session", "process_group", "pass_fds"}


def _end_as(run: Callable[..., None], *arguments: Any) -> None:
    """Call `run` and end this process as Python ends, but leave its memory as it is: else each page would be copied."""
    code = 1
    try:
        run(*arguments)
        code = 0
    except SystemExit as exit_:
        if exit_.code is not None and not isinstance(exit_.code, int):
            print(exit_.code, file=sys.stderr)
        code = 0 if exit_.code is None else exit_.code if isinstance(exit_.code, int) else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            file.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    serve()
