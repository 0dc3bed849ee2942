"""The program, which sends itself a signal at a chosen point: `driver.py POINT AT SIGNAL WORDS…`.

Points: micro-batch (its gradients are about to be computed), update (it is about to be made), evaluation (a
batch of one is about to be computed), save (one is about to begin), due (whether to save after an update is about to
be decided). Counted from 1, in this process. Several signals are joined by commas. NAME=VALUE in place of one sets a
variable of the environment, such as FAULT_CLOCK of the preloaded library.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

POINTS = {
    "micro-batch": ("runner.training.train_step", "dropout_key"),
    "update": ("runner.training.trainer", "Trainer.train_step"),
    "evaluation": ("runner.training.validate", "loss_sum"),
    "save": ("runner.training.state_files", "checkpoint_files"),
    "due": ("runner.checkpoints.save_policy", "SavePolicy.due"),
}


def main() -> int:
    point, at, number, *arguments = sys.argv[1:]
    from runner.backends.cpu import blas

    blas.load_blas()
    module_name, names = POINTS[point]
    *path, name = names.split(".")
    holder: Any = importlib.import_module(module_name)
    for part in path:
        holder = getattr(holder, part)
    own, seen = getattr(holder, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == int(at):
            for one in number.split(","):
                if "=" in one:
                    os.environ.update([one.split("=", 1)])
                else:
                    os.kill(os.getpid(), getattr(signal, one))
        return own(*args, **kwargs)

    setattr(holder, name, counted)
    from runner.cli.main import main as cli

    return cli(arguments)


if __name__ == "__main__":
    sys.exit(main())
