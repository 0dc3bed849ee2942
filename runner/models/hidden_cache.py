"""Hidden states after the frozen blocks, by row, from a cache or computed by a backend.

On the CPU a row is always computed alone, at a length rounded up to a multiple of 16 and at least 48, so its states are
a function of its tokens, the base and the BLAS alone: whether they come from a cache that was filled before a stop, in
another run or never, does not change a bit of the training. On a GPU the rows of a batch are computed together, because
small products are slow there; bitwise equality is not promised on it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from runner.common.cache_dir import cache_dir
from runner.common.disk_cache import cache_key
from runner.config.schema import HiddenCacheConfig
from runner.data.token_set import TokenSet
from runner.models.device import device_identity, on_cpu
from runner.models.hidden_store import GB, Budget, HiddenStateStore

MIN_BYTES_ON_DISK = 10**5
"""States of a token set that are smaller altogether are recomputed in a tenth of a second and need no file."""
_MIN_LENGTH = 48
"""Some BLAS compute shorter products by other code, whose results differ in the last digits."""
_LENGTH_MULTIPLE = 16
_FORMAT = 1
_NUMPY_DTYPES = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16}
"""NumPy has no bfloat16: such states are held as their bits."""

ComputeHidden = Callable[[np.ndarray], np.ndarray]
"""Token ids (batch, length) to hidden states (batch, length, hidden_size): `Backend.run_frozen_blocks`."""


class HiddenStates:
    """The hidden states (length, hidden_size) of each row of one token set; `length` is the row length minus 1."""

    def __init__(
        self, compute: ComputeHidden, token_set: TokenSet, store: HiddenStateStore, dtype: np.dtype, hidden_size: int
    ) -> None:
        self.compute_hidden, self._token_set, self.store = compute, token_set, store
        self.dtype, self.hidden_size = dtype, hidden_size

    def cached(self, row: int) -> np.ndarray | None:
        """Return the cached states of a row, or None. Computes nothing; any thread may call it."""
        data = self.store.fetch(row)
        return None if data is None else data.view(self.dtype).reshape(-1, self.hidden_size)

    def complete(self) -> bool:
        """Return whether every row is cached on disk."""
        return self.store.complete()

    def compute(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Compute the states of `rows`, cache and return them. For the training thread."""
        if not rows:
            return []
        groups = [[row] for row in rows] if on_cpu() else [list(rows)]
        return [states for group in groups for states in self._compute_together(group)]

    def _compute_together(self, rows: list[int]) -> list[np.ndarray]:
        tokens = [self._token_set.row(row)[0][:-1] for row in rows]
        longest = max(_MIN_LENGTH, *(len(t) for t in tokens))
        inputs = np.zeros((len(rows), -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE), np.int32)
        for padded, ids in zip(inputs, tokens, strict=True):
            padded[: len(ids)] = ids
        hidden = self.compute_hidden(inputs)
        states = [hidden[i, : len(ids)].copy() for i, ids in enumerate(tokens)]
        for row, array in zip(rows, states, strict=True):
            self.store.put(row, array)
        return states


class HiddenStateCaches:
    """The hidden states of one base model after its frozen blocks, by token set; jobs in one process share them."""

    def __init__(
        self,
        compute: ComputeHidden,
        *,
        dtype: mx.Dtype,
        hidden_size: int,
        cache_key_parts: Mapping[str, Any],
        config: HiddenCacheConfig,
        log: Callable[[str], None],
    ) -> None:
        """`cache_key_parts`: everything but the tokens that the states depend on, such as the base model's contents."""
        self._compute, self._dtype, self._hidden_size = compute, dtype, hidden_size
        self._cache_key_parts, self._log = cache_key_parts, log
        self._folder = Path(config.folder).expanduser() if config.folder else cache_dir() / "trunk"
        self._memory, self._disk_bytes = Budget(int(config.memory_gb * GB)), int(config.disk_gb * GB)
        self._states: dict[str, HiddenStates] = {}

    def set_compute(self, compute: ComputeHidden) -> None:
        """Compute with the backend of the next job from now on; that of the last one can be freed."""
        self._compute = compute
        for states in self._states.values():
            states.compute_hidden = compute

    def for_token_set(self, token_set: TokenSet) -> HiddenStates:
        """Return the hidden states of `token_set`, the same object for equal token sets."""
        if token_set.fingerprint not in self._states:
            own_parts = {"tokens": token_set.fingerprint, "dtype": str(self._dtype), "version": _FORMAT}
            name = cache_key({**self._cache_key_parts, **own_parts})[:32]
            offsets = (token_set.offsets - np.arange(len(token_set.offsets))) * self._hidden_size * self._dtype.size
            location = self.disk_location(token_set)
            store = HiddenStateStore(
                offsets,
                memory=self._memory,
                disk_bytes=self._disk_bytes,
                folder=location[0] / name if location else None,
                log=self._log,
            )
            dtype = np.dtype(_NUMPY_DTYPES[self._dtype])
            self._states[token_set.fingerprint] = HiddenStates(
                self._compute, token_set, store, dtype, self._hidden_size
            )
        return self._states[token_set.fingerprint]

    def disk_location(self, token_set: TokenSet) -> tuple[Path, int] | None:
        """Return the folder that caches the states of `token_set`, and the bytes that they take there at most; None
        where they are cached in memory alone."""
        size = (len(token_set.tokens) - len(token_set)) * self._hidden_size * self._dtype.size
        on_disk = self._disk_bytes and size >= MIN_BYTES_ON_DISK
        return (self._folder, min(size, self._disk_bytes)) if on_disk else None

    def close(self) -> None:
        """Free memory and close files."""
        for states in self._states.values():
            states.store.close()
        self._states.clear()


def numeric_platform() -> dict[str, Any]:
    """Return what the last digits of a hidden state depend on beside model, tokens and BLAS."""
    return {
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "numpy": version("numpy"),
        "machine": platform.machine(),
        "processor": _processor(),
        "device": str(mx.default_device()),
        **device_identity(),  # empty on the CPU of other systems than macOS, whose caches stay valid
    }


def _processor() -> str:
    """Return the CPU's model name: kernels are chosen by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
