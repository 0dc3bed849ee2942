"""Stock mlx-lm with small changes around it: ``python benchmarks/stock.py [FLAGS] -- lora -c …``.

``--blas`` loads the BLAS that the runner uses before MLX; ``--sort`` repairs mlx-lm's sort by length;
``--exact`` excludes the one padding token per row from its loss. The last line printed is MLX's peak memory.
"""

from __future__ import annotations

import sys
from typing import Any


def main(arguments: list[str]) -> None:
    """Apply the flags before ``--``, then run mlx-lm with the arguments after it."""
    flags, rest = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    if "--blas" in flags:
        from runner.backends import blas

        blas.load_blas()
    if "--sort" in flags:
        repair_sort()
    if "--exact" in flags:
        repair_loss()
    sys.argv = ["mlx_lm", *rest]
    from mlx_lm import cli

    cli.main()
    import mlx.core as mx

    print(f"mlx peak memory {mx.get_peak_memory() / 1e9:.3f} GB")


def repair_sort() -> None:
    """Sort by the number of tokens of a row; stock mlx-lm takes the number of its columns."""
    from mlx_lm.tuner.datasets import CacheDataset

    CacheDataset.itemlen = lambda self, index: len(self[index][0])


def repair_loss() -> None:
    """End the supervised part of a row at its last token."""
    from functools import partial

    import mlx.core as mx
    from mlx_lm import lora
    from mlx_lm.tuner.trainer import default_loss

    def exact_loss(model: Any, batch: Any, spans: Any) -> Any:
        return default_loss(model, batch, spans - mx.array([0, 1]))

    lora.train = partial(lora.train, loss=exact_loss)


if __name__ == "__main__":
    main(sys.argv[1:])
