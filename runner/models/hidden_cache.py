"""The frozen trunk, computed once: hidden states at the cut, by row, from a cache or from the model.

Exactness. On the CPU a row is always computed alone, at a length rounded up to a multiple of 16 and at least 48, so
its states are a function of its tokens, the base and the BLAS alone: whether they come from a cache that was filled
before a stop, in another run or never, no bit of the training changes. On a GPU the rows of a batch are computed
together, because small products are slow there; bits are not promised on it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from runner.data.tokenize import TokenSet
from runner.models.device import on_cpu
from runner.models.forward import Forward
from runner.models.hidden_store import GB, Budget, HiddenStateStore

WORTH_A_FILE = 10**5
"""Bytes of all states of a token set; fewer are computed again in a tenth of a second."""
LEAST_LENGTH = 48
"""Of what is computed. Shorter products take a path of their own in some BLAS, which costs more than the padding."""
_MULTIPLE = 16
_VERSION = 1
_BYTES = {mx.float32: np.uint32, mx.bfloat16: np.uint16, mx.float16: np.uint16}
_AS = {mx.float32: mx.uint32, mx.bfloat16: mx.uint16, mx.float16: mx.uint16}


class HiddenStates:
    """The states (length, width) of each row of one TokenSet; `length` is that of the row less its last token."""

    def __init__(self, forward: Forward, rows: TokenSet, store: HiddenStateStore, dtype: mx.Dtype, width: int) -> None:
        self.forward, self._rows, self._store = forward, rows, store
        self.dtype, self.width = dtype, width
        self.raw = _BYTES[dtype]
        """NumPy's type of the same size: NumPy knows no bfloat16, and the bits only pass through."""

    def stored(self, row: int) -> np.ndarray | None:
        """The states of a row as they are cached, in `raw`, or None. Computes nothing, so from any thread."""
        data = self._store.fetch(row)
        return None if data is None else data.view(self.raw).reshape(-1, self.width)

    def complete(self) -> bool:
        """Whether the cache has every row."""
        return self._store.complete()

    def compute(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The states of rows from the model, in `raw`; they are cached. On the thread of training."""
        if not rows:
            return []
        together = [list(rows)] if not on_cpu() else [[row] for row in rows]
        return [states for part in together for states in self._computed(part)]

    def _computed(self, rows: list[int]) -> list[np.ndarray]:
        tokens = [self._rows.row(row)[0][:-1] for row in rows]
        longest = max(LEAST_LENGTH, *(len(t) for t in tokens))
        inputs = np.zeros((len(rows), -(-longest // _MULTIPLE) * _MULTIPLE), np.int32)
        for line, ids in zip(inputs, tokens, strict=True):
            line[: len(ids)] = ids
        self.forward.ensure_below()
        engine = self.forward.engine
        if engine is not None:
            raw = engine.below(inputs).view(self.raw)
        else:
            raw = np.array(self.forward.below(mx.array(inputs)).view(_AS[self.dtype]), copy=False)
        out = [raw[i, : len(ids)].copy() for i, ids in enumerate(tokens)]
        for row, data in zip(rows, out, strict=True):
            self._store.keep(row, data)
        return out

    def array(self, raw: np.ndarray) -> mx.array:
        """States in `raw` as an MLX array of the model's dtype."""
        return mx.array(raw).view(self.dtype)


class HiddenStateCaches:
    """The trunks of one base at one cut, by token set; jobs of a sweep in one process share them."""

    def __init__(
        self,
        forward: Forward,
        identity: dict[str, Any],
        *,
        memory_gb: float,
        disk_gb: float,
        folder: Path | None,
        say: Callable[[str], None],
    ) -> None:
        """`identity`: what the states depend on beside the tokens, such as the base's fingerprint."""
        self.forward = forward
        self._identity, self._folder, self._say = identity, folder, say
        self._memory, self._disk = Budget(int(memory_gb * GB)), int(disk_gb * GB)
        probe = forward.below(mx.array(np.ones((1, 1), np.int32)))
        self._dtype, self._width = probe.dtype, probe.shape[-1]
        self._trunks: dict[str, tuple[HiddenStates, HiddenStateStore]] = {}

    def use(self, forward: Forward) -> None:
        """Compute with another job's forward pass from here on; the first one's memory is let go of."""
        self.forward = forward
        for trunk, _ in self._trunks.values():
            trunk.forward = forward

    def of(self, rows: TokenSet) -> HiddenStates:
        """The trunk of `rows`, the same for equal rows."""
        if rows.fingerprint not in self._trunks:
            key = {**self._identity, "tokens": rows.fingerprint, "dtype": str(self._dtype), "version": _VERSION}
            name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
            size = self._width * self._dtype.size
            offsets = (rows.offsets - np.arange(len(rows.offsets))) * size
            place = self.place(rows)
            store = HiddenStateStore(
                offsets,
                memory=self._memory,
                disk=self._disk,
                folder=place[0] / name if place else None,
                say=self._say,
            )
            self._trunks[rows.fingerprint] = (HiddenStates(self.forward, rows, store, self._dtype, self._width), store)
        return self._trunks[rows.fingerprint][0]

    def place(self, rows: TokenSet) -> tuple[Path, int] | None:
        """The folder that keeps the states of `rows`, and the bytes that they take there at most; None: memory does."""
        size = self._size(rows)
        return (self._folder, min(size, self._disk)) if self._folder and self._disk and size >= WORTH_A_FILE else None

    def _size(self, rows: TokenSet) -> int:
        return (len(rows.tokens) - len(rows)) * self._width * self._dtype.size

    def close(self) -> None:
        """Let go of all that is held."""
        for _, store in self._trunks.values():
            store.close()
        self._trunks.clear()


def numeric_platform() -> dict[str, Any]:
    """What the bits of a hidden state depend on beside model and tokens, where no BLAS is named."""
    return {
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "numpy": version("numpy"),
        "machine": platform.machine(),
        "processor": _processor(),
        "device": str(mx.default_device()),
    }


def _processor() -> str:
    """The CPU's name: kernels are chosen by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
