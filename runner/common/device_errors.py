"""Which exceptions mean that the memory or the GPU failed, and not the program: told by their type and message.

The messages are MLX's own (its allocators for Metal, CUDA and the CPU, and the errors of Metal's command buffers), and
those that CUDA's and Metal's drivers add.
"""

from __future__ import annotations

import errno
import re

from runner.common.errors import GpuError, OutOfMemory
from runner.common.text import first_line, shorten

_MEMORY = re.compile(
    r"\[(metal::)?malloc\]"  # Unable to allocate N bytes; Resource limit (N) exceeded; maximum allowed buffer size
    r"|Insufficient Memory|ErrorOutOfMemory"  # Metal: kIOGPUCommandBufferCallbackErrorOutOfMemory
    r"|out of memory"  # CUDA
    r"|bad_alloc",
    re.IGNORECASE,
)
_GPU = re.compile(
    r"\[METAL\] Command buffer execution failed|kIOGPUCommandBufferCallbackError"  # watchdog timeouts, hangs, resets
    r"|\bcu(da)?[A-Z]\w*(\(.*\))? failed: "  # how MLX reports a call of CUDA that failed
)


def find_device_error(error: BaseException) -> OutOfMemory | GpuError | None:
    """Return the failure of the memory or the GPU that `error`, or what it was raised from, reports; None if it
    reports none, or is one already."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if isinstance(cause, (OutOfMemory, GpuError)):
            return None
        seen.append(cause)
        cause = cause.__cause__
    for cause in seen:
        message = shorten(first_line(str(cause)) or type(cause).__name__, 500)
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return OutOfMemory(f"out of memory: {message}")
        if isinstance(cause, RuntimeError) and _MEMORY.search(str(cause)):
            return OutOfMemory(f"out of memory: {message}")
        if isinstance(cause, RuntimeError) and _GPU.search(str(cause)):
            return GpuError(f"the GPU failed: {message}")
    return None
