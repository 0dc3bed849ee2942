"""A rank that another process has started: `python -m runner.cli.rank`, with MLX_RANK and MLX_HOSTFILE set.

Its standard input is a pipe to that process, rank 0: where it ends, so has rank 0.
"""

from __future__ import annotations

import select
import sys

from runner.cli.main import report_error
from runner.common.errors import EXIT_INTERRUPTED, EXIT_RANK_LOST, RunnerError


def main() -> int:
    """Train as the rank that the environment names until rank 0 ends, and return its exit code."""
    try:
        from runner.backends import blas
        from runner.distributed.launch import find_launch

        launch = find_launch()
        assert launch is not None and launch.rank > 0
        blas.load_blas(launch.local)  # before MLX is imported
        from runner.training.follow import follow
        from runner.training.local_ranks import LOCAL_JOIN_SECONDS

        return follow(launch, seconds=LOCAL_JOIN_SECONDS, check=_check_parent)
    except RunnerError as error:
        return report_error(error, error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _check_parent() -> None:
    """Exit if rank 0 has ended."""
    if select.select([0], [], [], 0)[0]:
        sys.exit(EXIT_RANK_LOST)


if __name__ == "__main__":
    sys.exit(main())
