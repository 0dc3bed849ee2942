"""mlx-lm's layers are imported without the loggers that mlx-lm knows."""

from __future__ import annotations

IMPORTS = """
import sys
import runner.training.run
print("imported:", *sorted({"wandb", "swanlab", "mlflow", "tensorboardX", "trackio"} & set(sys.modules)))
import wandb
print("wandb", wandb.__version__)
"""


def test_training_imports_no_library_of_a_logger_that_is_not_chosen(cli):
    output, _ = cli.start(words=("-c", IMPORTS)).communicate(timeout=120)
    imported, version = output.splitlines()[-2:]
    assert imported == "imported:" and version.startswith("wandb ")
