"""Names of a run's files, the metric that ranks its checkpoints, and its states."""

from __future__ import annotations

ADAPTERS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BEST_METRIC = "valid_loss"
"""The metric that ranks checkpoints; lower is better."""
STATES = ("running", "finished", "stopped", "failed", "diverged", "interrupted")
"""The values of "state" in status.json, and "interrupted" for a run that was killed."""
