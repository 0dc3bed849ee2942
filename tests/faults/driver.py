"""The program, which sends itself a signal at a chosen point: `driver.py POINT AT SIGNAL WORDS…`.

Points: micro-batch (its gradients are about to be computed), update (it is about to be made), evaluation (a
batch of one is about to be computed), save (one is about to begin). Counted from 1, in this process.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

POINTS = {
    "micro-batch": ("runner.training.step", "dropout_key"),
    "update": ("runner.training.loop", "learn"),
    "evaluation": ("runner.training.evaluation", "cross_entropy_sum"),
    "save": ("runner.training.state", "files_of"),
}


def main() -> int:
    point, at, number, *words = sys.argv[1:]
    from runner import blas

    blas.prepare()
    module_name, name = POINTS[point]
    module = importlib.import_module(module_name)
    own, seen = getattr(module, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == int(at):
            os.kill(os.getpid(), getattr(signal, number))
        return own(*args, **kwargs)

    setattr(module, name, counted)
    from runner.__main__ import main as door

    return door(words)


if __name__ == "__main__":
    sys.exit(main())
