"""Failures of the memory or the GPU, with the command that continues the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runner.common.commands import resume_command
from runner.common.device_errors import find_device_error
from runner.common.errors import OutOfMemory
from runner.runs.run_spec import RunSpec


@contextmanager
def device_errors_explained(spec: RunSpec) -> Iterator[None]:
    """Raise an error of the memory or the GPU as OutOfMemory or GpuError, with the command to type next."""
    try:
        yield
    except Exception as error:
        failure = find_device_error(error)
        if failure is None:
            raise
        saves_memory = isinstance(failure, OutOfMemory) and not spec.config.train.grad_checkpoint
        command = resume_command(spec.directory.path) + " train.grad_checkpoint=true" * saves_memory
        raise type(failure)(
            f"{failure}\nNothing that was saved is lost. To continue"
            f"{' with less memory, more slowly, to the same result' if saves_memory else ''}: {command}"
        ) from error
