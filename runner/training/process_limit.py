"""When the process of a supervised run is replaced by a new one, before a GPU's limits end it.

Metal allows a process some 499,000 buffers (`resource_limit` of `mx.device_info()`), and MLX raises an error beyond.
MLX counts them and does not tell the number. What a program can see is the memory in use between two updates, where all
that remains is the model, the adapter and the optimizer: if that grows, something is not freed. Buffers of a few bytes
do not show there, so that a process is also replaced after a number of updates, whatever it looks like.
"""

from __future__ import annotations

import mlx.core as mx

from runner.config.invocation import Supervision
from runner.models.device import on_cpu

UPDATES = 10_000
"""Updates of one process on a GPU. With up to 49 buffers that are never freed in each, it stays below the limit, and
loading the model again costs seconds where so many updates take hours."""
_SETTLED = 10
"""Updates after which all that a run allocates once is there."""
_MIN_GROWTH = 1e9
"""Bytes; less is no danger."""


class ProcessLimit:
    """Counts the updates of this process and watches its memory."""

    def __init__(self, supervise: Supervision | None, *, watches_memory: bool = True) -> None:
        """`supervise`: None where no supervisor would start a new process, so that the limit is never reached.
        `watches_memory`: not where other ranks would have to know, whose memory is their own."""
        on_gpu = supervise is not None and not on_cpu()
        self._updates = supervise.replace_every if supervise else None
        if self._updates is None and on_gpu:
            self._updates = UPDATES
        self._watches_memory = on_gpu and watches_memory
        self._made = 0
        self._settled_bytes = 0

    def count_update(self) -> None:
        """Count an update that was made."""
        self._made += 1
        if self._made == _SETTLED and self._watches_memory:
            self._settled_bytes = mx.get_active_memory()

    def is_reached(self) -> bool:
        """Return whether the process should be replaced now, between two updates."""
        if self._updates is not None and self._made >= self._updates:
            return True
        return bool(self._settled_bytes) and has_leaked(self._settled_bytes, mx.get_active_memory())


def has_leaked(settled: int, active: int) -> bool:
    """Return whether memory in use between updates has doubled since it was `settled` (bytes), by 1 GB or more."""
    return active - settled > max(settled, _MIN_GROWTH)
