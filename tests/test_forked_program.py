"""A forked process is what the same words of Python would be: the tests that start the program rely on it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from forked_program import ForkedProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")

DESCRIBE = """
import json, os, signal, sys
names = {"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ), "path": sys.path[0], "name": __name__,
    "handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD)],
    "open": sorted(os.listdir("/proc/self/fd"))[:3], "leads": os.getsid(0) == os.getpid()}
print(json.dumps(names))
"""


@pytest.fixture
def both(cli) -> Callable:
    """`both(*words)`: exit code and output of a forked process and of one that is not."""

    def run(*words: str, **options) -> list[tuple[int, str]]:
        found = []
        for fork in (True, False):
            process = cli.start(words=words, fork=fork, **options)
            assert isinstance(process, ForkedProcess) == fork
            output, _ = process.communicate(timeout=60)
            found.append((process.returncode, output))
        return found

    return run


@pytest.mark.parametrize("kind", ["script", "module", "-c"])
def test_it_finds_what_a_process_of_its_own_finds(both, cli, kind):
    (cli.folder / "look.py").write_text(DESCRIBE)
    words = {"script": ("look.py",), "module": ("-m", "look"), "-c": ("-c", DESCRIBE)}[kind]
    (code, ours), (expected, theirs) = both(*words, "a b", env={"MORE": "1"}, start_new_session=True)
    assert code == expected == 0, ours + theirs
    ours, theirs = json.loads(ours), json.loads(theirs)
    for found in (ours, theirs):
        found["env"].pop("LC_CTYPE", None)  # set by Python itself, where no locale is
    assert ours == theirs
    assert ours["argv"] == ["a b"] and ours["env"]["MORE"] == "1" and ours["leads"]


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit('a reason')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "raise KeyboardInterrupt",
        "import atexit, threading; atexit.register(print, 'last'); threading.Timer(0.1, print, ['later']).start()",
    ],
)
def test_it_ends_as_a_process_of_its_own(both, code):
    (ours, output), (theirs, expected) = both("-c", code)
    assert ours == theirs
    assert output.splitlines()[-1:] == expected.splitlines()[-1:]


def test_a_signal_and_a_pipe_reach_it(cli):
    process = cli.start(
        words=("-c", "print(input(), flush=True); input()"), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.readline() == "hello\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM


def test_the_processes_that_it_starts_are_forked_too_and_what_they_import_differently_are_not(cli):
    code = (
        "import os, subprocess, sys; words = [sys.executable, '-m', 'runner.cli.supervised', '0']\n"
        "for more in ({}, {'HOME': '/'}): print(type(subprocess.Popen(words, env=os.environ | more)).__name__)"
    )
    process = cli.start(words=("-c", code), stderr=subprocess.DEVNULL)
    output, _ = process.communicate(timeout=60)
    assert output.split() == ["ForkedProcess", "Popen"]
