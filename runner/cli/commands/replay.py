"""`runner verify --replay`: train again from one checkpoint to the next, in a scratch folder, and compare the two.

On the CPU the two must be equal bit for bit. A GPU may compute the same step with different last bits: there the steps
are trained twice, and the stored checkpoint may differ by a few times what these two differ by, or by the rounding of
sums in another order where they happen to be equal.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runner.backends.blas import THREAD_VARIABLES
from runner.checkpoints import verify
from runner.checkpoints.safetensors_file import Tensor, unpack
from runner.checkpoints.store import step_name
from runner.checkpoints.verify import LoadedCheckpoint
from runner.cli.commands import stored_settings
from runner.common.cache_dir import cache_dir
from runner.common.errors import ConfigError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTERS, UNAVERAGED
from runner.config import validation
from runner.config.schema import Config
from runner.runs.directory import RunDirectory
from runner.runs.rows import read_rows
from runner.runs.run_spec import ResumeSource, RunSpec, new_run_id

NOISE_FACTOR = 4.0
"""On a GPU, how many times the difference between two replays a stored checkpoint may differ from the first."""
FLOAT32_EPSILON = float(np.finfo(np.float32).eps)
_STATE, _OPTIMIZER = "train_state.json", "optimizer.safetensors"
_PROGRESS_FIELDS = ("step", "tokens")
_ROW_FIELDS = ("step", "split", "loss", "learning_rate", "grad_norm", "epoch", "tokens", "supervised_tokens")


@dataclass(frozen=True)
class Replay:
    """The comparison of stored steps with the same steps trained again."""

    first: int
    last: int
    differences: list[str]
    """What differs, a phrase each; empty if the steps were reproduced."""
    environment_changes: list[str]
    """What computed the steps then and now, where it differs."""
    noise: dict[str, float] | None
    """On a GPU, the largest relative difference between two replays, by file."""

    @property
    def reproduced(self) -> bool:
        """Whether the replay gave the stored checkpoint."""
        return not self.differences

    @property
    def message(self) -> str:
        """The result in a sentence."""
        steps = f"steps {self.first} to {self.last} trained again"
        if self.reproduced:
            return f"{steps}: the same" + (", bit for bit" if self.noise is None else " within this device's noise")
        reasons = f" ({'; '.join(self.environment_changes)})" if self.environment_changes else ""
        return f"{steps}: NOT the same: {'; '.join(self.differences)}{reasons}"

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        return {
            "from": self.first,
            "to": self.last,
            "reproduced": self.reproduced,
            "message": self.message,
            "differences": self.differences,
            "noise": self.noise,
        }


def replay(run: Path, valid_steps: list[int], start: int | None = None) -> Replay:
    """Train `run` again between two of its checkpoints and compare.

    Args:
        run: the run directory.
        valid_steps: the steps of its valid checkpoints, in order.
        start: the checkpoint to start at; None means the last but one, or the beginning of a run with one checkpoint.

    Raises:
        ConfigError: there is no such pair of checkpoints.
        RunnerError: the run cannot be trained here: its model or its data are missing or changed.
    """
    first, last = choose_steps(run, valid_steps, start)
    checkpoints = RunDirectory(run, stored_settings.read_settings(run).config.checkpoint.dir).checkpoints
    stored = _Trained.load(checkpoints / step_name(last))
    _set_thread_count(stored.state["environment"])
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="replay-", dir=folder))
    try:
        replayed = _train(run, checkpoints, first, stored, scratch / "1")
        noise = None
        if "cpu" not in str(replayed.state["environment"]["device"]):
            second = _train(run, checkpoints, first, stored, scratch / "2")
            noise = tensor_differences(replayed.checkpoint, second.checkpoint)
        tokens = stored.state["progress"]["tokens"] / last
        differences = _compare(stored, replayed, noise, noise_floor(last - first, tokens))
        if noise is None:
            size = stored.state["metrics_offset"]
            differences += _compare_rows(run / "metrics.jsonl", scratch / "1/metrics.jsonl", size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    then, now = stored.state["environment"], replayed.state["environment"]
    changes = [f"{name} was {then[name]}, is {now.get(name)}" for name in then if then[name] != now.get(name)]
    return Replay(first, last, differences, changes, noise)


def choose_steps(run: Path, valid_steps: list[int], start: int | None) -> tuple[int, int]:
    """Return the steps to train between; step 0 is the beginning of the run.

    Raises:
        ConfigError: there are no such checkpoints.
    """
    if not valid_steps:
        raise ConfigError(f"{run} has no checkpoint to compare with.")
    if start is None:
        return (valid_steps[-2] if len(valid_steps) > 1 else 0), valid_steps[-1]
    later = [step for step in valid_steps if step > start]
    if start not in (0, *valid_steps) or not later:
        known = ", ".join(str(step) for step in (0, *valid_steps[:-1]))
        raise ConfigError(f"--from {start}: {run} can be trained again from step {known}.")
    return start, later[0]


def noise_floor(updates: int, tokens: float) -> float:
    """Return the relative difference that a GPU may make over `updates` of `tokens` each, if two replays are equal too.

    The gradient of a weight is a sum over the tokens of an update. In another order, the sum of n terms differs by
    about sqrt(n) times the rounding of one (Higham and Mary, "A new approach to probabilistic rounding error analysis",
    2019), and the differences of the updates add up.
    """
    return FLOAT32_EPSILON * math.sqrt(max(1.0, tokens)) * updates


def tensor_differences(first: LoadedCheckpoint, second: LoadedCheckpoint) -> dict[str, float]:
    """Return the largest difference by file, relative to the largest value of a tensor; 0.0 for equal bytes."""
    differences = {}
    for name in (ADAPTERS, UNAVERAGED, _OPTIMIZER):
        if name not in first.files:  # without weight averaging
            continue
        if first.files[name] == second.files[name]:
            differences[name] = 0.0
            continue
        tensors, others = (unpack(loaded.files[name], where=name)[0] for loaded in (first, second))
        if _shapes(tensors) != _shapes(others):
            differences[name] = float("inf")
        else:
            differences[name] = max((_relative_difference(tensors[key], others[key]) for key in tensors), default=0.0)
    return differences


@dataclass(frozen=True)
class _Trained:
    checkpoint: LoadedCheckpoint
    state: dict[str, Any]
    """Content of train_state.json."""

    @staticmethod
    def load(folder: Path) -> _Trained:
        loaded = verify.load_checkpoint(folder, FileSystem())
        return _Trained(loaded, json.loads(loaded.files[_STATE]))


def _train(run: Path, checkpoints: Path, first: int, stored: _Trained, scratch: Path) -> _Trained:
    """Train `run` from step `first` to that of `stored` in the folder `scratch`."""
    from runner.backends import blas

    blas.load_blas()  # before MLX is imported
    from runner.models.precision import recorded_precision
    from runner.training.run import train_run as train

    settings, state, last = _settings(run), stored.state, stored.checkpoint.checkpoint.step
    if not first:  # an earlier version stored null where the backend chose: the checkpoint records it
        settings.data.window = state["position"].get("window") or settings.data.window
    precision = recorded_precision(state.get("precision"), state["environment"].get("device"))
    directory = RunDirectory(scratch, settings.checkpoint.dir)
    directory.claim()
    source = ResumeSource(run.absolute(), (checkpoints / step_name(first)).absolute()) if first else None
    config = RunDirectory(run).read_config()
    spec = RunSpec(settings, config, directory, source, new_run_id(), stop_at=last, label="replay", precision=precision)
    with open(os.devnull, "w") as null, redirect_stdout(null):
        try:
            train(spec)
        except SystemExit as stopped:  # by a signal
            raise KeyboardInterrupt from stopped
    return _Trained.load(directory.checkpoints / step_name(last))


def _settings(run: Path) -> Config:
    """Return the run's settings, without what only takes time or writes elsewhere."""
    settings = validation.fill_defaults(stored_settings.read_settings(run).config)
    settings.loggers = {}
    settings.checkpoint.backup = None
    settings.data.metric_rows = 0
    return settings


def _compare(stored: _Trained, replayed: _Trained, noise: Mapping[str, float] | None, floor: float) -> list[str]:
    """Return what differs; `noise` is None where the two have to be equal."""
    differences = []
    for name, difference in tensor_differences(stored.checkpoint, replayed.checkpoint).items():
        if difference > (max(NOISE_FACTOR * noise[name], floor) if noise else 0.0):
            differences.append(f"{name} differs by up to {difference:.1e} of its largest value")
    then, now = (_compared_values(trained.state) for trained in (stored, replayed))
    differences += [f"{name} was {then[name]}, is {now.get(name)}" for name in then if then[name] != now.get(name)]
    return differences


def _compared_values(state: Mapping[str, Any]) -> dict[str, Any]:
    progress = {name: state["progress"][name] for name in _PROGRESS_FIELDS}
    return {**state["position"], "random_state": state["random_state"], **progress}


def _compare_rows(stored: Path, replayed: Path, size: int) -> list[str]:
    """Return the first difference between the metrics rows that both runs wrote for the same step.

    Reporting intervals may have changed: only rows over the same tokens are compared.
    """
    replayed_rows = {(row["step"], row.get("split")): row for row in read_rows(replayed)}
    for row in read_rows(stored, size):
        step, split = row["step"], row.get("split")
        other = replayed_rows.get((step, split))
        if other is None or "loss" not in row or "loss" not in other:
            continue
        if split == "train" and row.get("supervised_tokens") != other.get("supervised_tokens"):
            continue
        for name in _ROW_FIELDS:
            if row.get(name) != other.get(name):
                return [f"{name} of the {split} row of step {step} was {row.get(name)}, is {other.get(name)}"]
    return []


def _set_thread_count(environment: Mapping[str, Any]) -> None:
    """Use the BLAS threads that the checkpoint was computed with, unless the environment sets them."""
    blas = environment.get("blas")
    threads = blas.get("threads") if isinstance(blas, Mapping) else None
    if isinstance(threads, int) and not any(name in os.environ for name in THREAD_VARIABLES):
        os.environ["OPENBLAS_NUM_THREADS"] = str(threads)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _relative_difference(first: Tensor, second: Tensor) -> float:
    a, b = _as_float64(first), _as_float64(second)
    return float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-30)) if a.size else 0.0


def _as_float64(tensor: Tensor) -> np.ndarray:
    values = tensor.array()
    if tensor.dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)
