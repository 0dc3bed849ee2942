"""Names that the files of a run have, and the words that its status uses."""

from __future__ import annotations

ADAPTERS = "adapters.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BEST_METRIC = "valid_loss"
"""What "best" compares, lower being better."""
STATES = ("running", "finished", "stopped", "failed", "diverged", "interrupted")
