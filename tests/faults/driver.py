"""Run the program and send it a signal at a chosen point: `driver.py POINT COUNT SIGNAL ARGUMENTS…`.

The signal comes just before the COUNT-th (from 1) call of the point's function, see `POINTS`. Several signals are
joined by commas. NAME=VALUE instead of a signal sets an environment variable, such as FAULT_CLOCK of the preloaded
library.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

POINTS = {
    "micro-batch": ("runner.training.train_step", "dropout_key"),
    "update": ("runner.training.trainer", "Trainer.update"),
    "evaluation": ("runner.backends.mlx.backend", "MlxBackend.row_losses"),
    "save": ("runner.training.state_files", "checkpoint_files"),
    "save decision": ("runner.checkpoints.save_policy", "SavePolicy.due"),
    "answers": ("runner.training.answers", "answer_rows"),
}
"""Module and function of each point; "evaluation" is one batch of one."""


def main() -> int:
    point, count, actions, *arguments = sys.argv[1:]
    from runner.backends import blas

    blas.load_blas()
    module_name, path = POINTS[point]
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module_name)
    for attribute in owners:
        owner = getattr(owner, attribute)
    function, calls = getattr(owner, name), 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(count):
            for action in actions.split(","):
                if "=" in action:
                    os.environ.update([action.split("=", 1)])
                else:
                    os.kill(os.getpid(), getattr(signal, action))
        return function(*args, **kwargs)

    setattr(owner, name, interrupted)
    from runner.cli.main import main as run_program

    return run_program(arguments)


if __name__ == "__main__":
    sys.exit(main())
