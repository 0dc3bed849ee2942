"""Typed and range-checked access to the metadata of one architecture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from runner.common.errors import ModelError
from runner.models.gguf.header import MetadataSection, T, Value


class ArchitectureMetadata(MetadataSection):
    """The metadata whose keys begin with the architecture's name; `used` collects the keys that were read."""

    def __init__(self, path: Path, metadata: dict[str, Value], architecture: str) -> None:
        super().__init__(path, metadata)
        self.prefix = architecture
        self.used: set[str] = set()

    def get(self, key: str, expected: type[T], default: T | None = None) -> T | None:
        self.used.add(f"{self.prefix}.{key}")
        return super().get(key, expected, default)

    def __contains__(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.metadata

    def require(self, key: str, expected: type[T], default: T | None = None) -> T:
        """Return the value of `key`, or `default`; raise ModelError if there is neither."""
        value = self.get(key, expected, default)
        if value is None:
            raise ModelError(f"{self.path}: the metadata key '{self.prefix}.{key}' is missing.")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Return an integer of 1 or more that fits 31 bits."""
        value = self.require(key, int, default)
        if not 1 <= value < 1 << 31:
            raise ModelError(f"{self.path}: '{self.prefix}.{key}' is {value}.")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a float32 as its shortest decimal: 1e-05, not 9.999999747378752e-06."""
        value = float(str(np.float32(self.require(key, float, default))))
        if not 0 < value < math.inf:
            raise ModelError(f"{self.path}: '{self.prefix}.{key}' is {value}.")
        return value

    def require_neutral(self, neutral_values: dict[str, Value]) -> None:
        """Refuse every key of `neutral_values` that has another value: the model class has no counterpart."""
        for key, neutral in neutral_values.items():
            value = self.get(key, type(neutral), neutral)
            if value != neutral:
                raise ModelError(
                    f"{self.path}: '{self.prefix}.{key}' is {value}, which is not supported. Use the safetensors of"
                    " the same model."
                )
