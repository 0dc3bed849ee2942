"""Errors of memory and of the GPU are told from errors of the program, by MLX's own messages."""

from __future__ import annotations

import errno

import pytest

from runner.app.errors import translate_error
from runner.common.device_errors import find_device_error
from runner.common.errors import GpuError, ModelError, OutOfMemory

METAL = "[METAL] Command buffer execution failed: "
MEMORY = [
    MemoryError(),
    MemoryError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[metal::malloc] Resource limit (499000) exceeded."),
    RuntimeError("[malloc] Unable to allocate 68719476736 bytes."),
    RuntimeError(
        "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size"
    ),
    RuntimeError(f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."),
    RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
    RuntimeError("cuGraphInstantiate failed: out of memory"),
]
GPU = [
    RuntimeError(f"{METAL}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."),
    RuntimeError(f"{METAL}Internal Error (0000000e:Internal Error)."),
    RuntimeError("cudaEventSynchronize(event_) failed: an illegal memory access was encountered"),
    RuntimeError("cudaStreamSynchronize(stream) failed: unspecified launch failure"),
]
OTHERS = [
    RuntimeError("[metal::Device] Unable to load kernel"),
    ValueError("out of memory"),
    RuntimeError("[matmul] Last dimension of first input with shape (1,2)"),
    OSError(errno.ENOSPC, "No space left on device"),
    KeyError("malloc"),
]


@pytest.mark.parametrize("error", MEMORY, ids=str)
def test_a_failed_allocation_is_out_of_memory(error):
    found = find_device_error(error)
    assert isinstance(found, OutOfMemory) and str(found).startswith("out of memory: ") and found.exit_code == 6
    assert isinstance(translate_error(error), OutOfMemory)


@pytest.mark.parametrize("error", GPU, ids=str)
def test_an_aborted_computation_is_a_gpu_error(error):
    found = find_device_error(error)
    assert isinstance(found, GpuError) and found.exit_code == 7


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_neither(error):
    assert find_device_error(error) is None


def test_what_an_error_was_raised_from_counts_and_one_that_is_found_already_does_not():
    wrapped = ModelError("this model cannot be trained")
    wrapped.__cause__ = MEMORY[4]
    assert isinstance(find_device_error(wrapped), OutOfMemory)
    explained = OutOfMemory("out of memory: …")
    explained.__cause__ = MEMORY[4]
    assert find_device_error(explained) is None
