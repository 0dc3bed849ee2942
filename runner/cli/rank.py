"""A rank that another process has started: `python -m runner.cli.rank`, with MLX_RANK and MLX_HOSTFILE set."""

from __future__ import annotations

import sys

from runner.cli.main import main

if __name__ == "__main__":
    sys.exit(main([]))
