"""What an export format has to do: write the adapter, read it again, and say how near it has to come."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from runner.config.schema import Config, ModelConfig
from runner.export.fidelity import FidelityCheck, FidelityRows, Measured
from runner.export.trained_adapter import TrainedAdapter
from runner.models.load import BaseModel, load_base_model


class Target(Protocol):
    """A format: how it is written, read again, and how near it has to come. Targets inherit from it."""

    limit: float
    """Largest deviation that passes, as `fidelity.FidelityCheck.limit`."""

    def write(self, trained: TrainedAdapter, path: Path) -> None:
        """Write the export to `path`: a new, empty folder, or a file that does not exist.

        Raises:
            RunnerError: the format cannot hold this adapter, or the disk fails.
        """

    def measure(self, trained: TrainedAdapter, path: Path, rows: FidelityRows) -> Measured:
        """Load what was written and return what it computes.

        Raises:
            RunnerError: it cannot be loaded.
        """

    def finish(self, trained: TrainedAdapter, check: FidelityCheck | None, path: Path) -> None:
        """Complete the export once it was compared, before it gets its name; most have nothing to add.

        Raises:
            RunnerError: it must not be exported.
        """
        return None


def load_written(path: Path, config: Config) -> BaseModel:
    """Load the model in the folder or GGUF file `path` as this device computes it."""
    return load_base_model(ModelConfig(path=str(path), trust_remote_code=config.model.trust_remote_code))
