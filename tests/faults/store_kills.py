"""A process whose children save, rotate and repair, each SIGKILLed inside the next system call by shim.c.

`store_kills.py FOLDER DO HOW_MANY`. DO: kill (at every call), half (after half of every write), repair (a kill at
every call of the repair after a kill at every call). HOW_MANY: all, or some of the repairs. Prints how many kills
each case had.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.checkpoints.store import CheckpointStore


def _cases() -> Any:
    spec = importlib.util.spec_from_file_location("store_cases", Path(__file__).parents[1] / "store_cases.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _cases()


def killed(act: Callable[[CheckpointStore], None], store: CheckpointStore, at: int, do: str) -> bool:
    """Return whether a child that did `act` was killed at call `at`; False if it ended before."""
    child = os.fork()
    if child == 0:
        os.environ["FAULT_UNDER"] = str(store.folder)
        os.environ["FAULT_CALLS"] = "write" if do == "half" else "open,write,fsync,close,rename,mkdir,remove"
        os.environ["FAULT_AT"], os.environ["FAULT_DO"] = str(at), do
        try:
            act(store)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def at_each_call(folder: Path, case: str, do: str) -> int:
    """Kill the case at each of its calls; return the number of kills."""
    steps, act, _, _ = cases.CASES[case]
    at = 0
    while True:
        store = cases.prepare(folder / f"{at}", steps)
        was_killed = killed(act, store, at, do)
        cases.check(CheckpointStore(store.folder, "run-1"), case, completed=not was_killed)
        shutil.rmtree(folder / f"{at}")
        if not was_killed:
            return at
        at += 1


def repairs(folder: Path, case: str, every: int) -> int:
    """Kill the case at each of its calls (one in `every`), then the repair at each of its calls; return the kills."""
    steps, act, _, _ = cases.CASES[case]
    at = kills = 0
    while True:
        store = cases.prepare(folder / f"{at}", steps)
        if not killed(act, store, at, "kill"):
            return kills
        second, was_killed = 0, True
        while was_killed:
            again = folder / f"{at}-{second}"
            shutil.copytree(store.folder.parent, again)
            was_killed = killed(
                lambda one: one.repair() and None, CheckpointStore(again / "checkpoints", "run-1"), second, "kill"
            )
            cases.check(CheckpointStore(again / "checkpoints", "run-1"), case, completed=False)
            shutil.rmtree(again)
            kills, second = kills + was_killed, second + 1
        at += every


def main() -> int:
    folder, do, how_many = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    kills_by_case = {}
    for number, case in enumerate(cases.CASES):
        case_folder = folder / str(number)
        every = 1 if how_many == "all" else 7
        kills_by_case[case] = (
            repairs(case_folder, case, every) if do == "repair" else at_each_call(case_folder, case, do)
        )
    print(json.dumps(kills_by_case))
    return 0


if __name__ == "__main__":
    sys.exit(main())
