"""Names of the files and folders of a run, the metric that ranks its checkpoints, and its states."""

from __future__ import annotations

import re

CONFIG = "config.yaml"
STATUS = "status.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
ROW_LOSSES = "row_losses.jsonl"
LOG = "run.log"
REPORT = "report.html"
LOCK = ".lock"
HYDRA = ".hydra"
BACKUP = "backup.json"
LABELS = "labels.json"
"""The name, the tags and the note of a run or a sweep."""
CHECKPOINTS = "checkpoints"
"""Default of checkpoint.dir."""
RESULT = "adapters"
"""The folder of a run's result."""
EVALUATIONS = "evaluations"
"""The folder of a run's results of lm-eval."""
EXPORT_PREFIX = "export-"
"""What the name of an export in a run's directory begins with."""
STEP_NAME = re.compile(r"step-([0-9]{7,18})")
"""The folder of a checkpoint."""
ADAPTERS = "adapters.safetensors"
UNAVERAGED = "unaveraged.safetensors"
"""With weight averaging, the weights after the last update; the adapter of the checkpoint is the mean."""
ADAPTER_CONFIG = "adapter_config.json"
TRAIN_STATE = "train_state.json"
BEST_METRIC = "valid_loss"
"""The metric that ranks checkpoints; lower is better."""
STATES = ("running", "finished", "stopped", "failed", "diverged", "interrupted")
"""The values of "state" in status.json, and "interrupted" for a run that was killed."""
