"""Where an adapter lies that a person names: a run's result, one of its checkpoints; read and verified. No MLX."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.checkpoints import manifest, verify
from runner.checkpoints.safetensors_file import read_header
from runner.checkpoints.store import CheckpointStore, step_name
from runner.checkpoints.verify import STEP_NAME, CheckpointRecord
from runner.common import safe_json
from runner.common.errors import CheckpointError, ConfigError, did_you_mean
from runner.common.filesystem import FileSystem
from runner.runs.directory import RunDirectory
from runner.runs.layout import ADAPTER_CONFIG, ADAPTERS, BEST_METRIC

_LARGEST = 1 << 40  # bytes of an adapter
_MOST_VALUES = 10_000  # in adapter_config.json


@dataclass(frozen=True)
class AdapterSource:
    """One adapter of one run."""

    run: Path
    folder: Path
    step: int | None
    """The update it is of; None where the run does not tell."""
    is_result: bool
    """Whether it is the run's result, not a checkpoint that was named."""
    adapters: bytes
    """adapters.safetensors; of a checkpoint, as its manifest vouches for it."""
    about: dict[str, Any]
    """adapter_config.json."""

    @property
    def name(self) -> str:
        """`step 40`, or `result` where the step is not known."""
        return "result" if self.step is None else f"step {self.step}"


def find_adapter(path: Path, checkpoint: str | None = None) -> AdapterSource:
    """The adapter that `path` means: a run directory (its result), a step-… folder, or an adapters/ folder.

    Args:
        path: what was typed.
        checkpoint: last, best or a step: one of the run's checkpoints instead of its result.

    Raises:
        ConfigError: nothing of the kind is there; says what is.
        CheckpointError: the adapter is damaged.
    """
    path = path.expanduser().absolute()
    if not path.exists():
        raise ConfigError(f"{path}: there is no such directory.{_near(path)}")
    if STEP_NAME.fullmatch(path.name) or path.name == "adapters":
        if checkpoint is not None:
            raise ConfigError(f"--checkpoint chooses one of a run's checkpoints, and {path} is not a run directory.")
        run = _run_above(path)
        return _of_checkpoint(run, path) if path.name != "adapters" else _of_result(run, path)
    if not (path / "config.yaml").is_file():
        raise ConfigError(_not_a_run(path))
    return (
        _of_result(path, path / "adapters") if checkpoint is None else _of_checkpoint(path, _chosen(path, checkpoint))
    )


def _of_checkpoint(run: Path, folder: Path) -> AdapterSource:
    loaded = verify.load_checkpoint(folder, FileSystem())
    for name in (ADAPTERS, ADAPTER_CONFIG):
        if name not in loaded.files:
            raise CheckpointError(f"{folder}: its manifest lists no {name}.")
    about = _about(loaded.files[ADAPTER_CONFIG], folder)
    return AdapterSource(run, folder, loaded.checkpoint.step, False, loaded.files[ADAPTERS], about)


def _of_result(run: Path, folder: Path) -> AdapterSource:
    if not (folder / ADAPTERS).exists():
        kept = [str(c.step) for c in _checkpoints(run)]
        have = (
            f"Its checkpoints: {', '.join(kept)}; --checkpoint last takes the newest." if kept else "It has none yet."
        )
        raise ConfigError(f"{run} has no result (adapters/): it is {RunDirectory(run).read_status()['state']}. {have}")
    disk = FileSystem()
    if disk.lstat(folder / manifest.NAME):
        return replace(_of_checkpoint(run, folder), is_result=True)
    # Made by an older version, or edited by another program: nothing vouches for it.
    read_header(folder / ADAPTERS)  # refused before its bytes fill the memory
    adapters = disk.read_file(folder / ADAPTERS, _LARGEST)
    about = _about(disk.read_file(folder / ADAPTER_CONFIG, 1 << 20), folder)
    step = RunDirectory(run).read_status().get("result_step")
    return AdapterSource(run, folder, step if isinstance(step, int) else None, True, adapters, about)


def _about(data: bytes, folder: Path) -> dict[str, Any]:
    try:
        about = safe_json.parse(data, most_values=_MOST_VALUES)
        if not isinstance(about, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {error}.") from None
    return about


def _chosen(run: Path, which: str) -> Path:
    kept = _checkpoints(run)
    if not kept:
        raise ConfigError(f"{run} has no checkpoints.")
    if which == "last":
        return kept[-1].path
    if which == "best":
        measured = [
            (c.metrics[BEST_METRIC], c.step, c.path)
            for c in kept
            if math.isfinite(c.metrics.get(BEST_METRIC, math.nan))
        ]
        if not measured:
            raise ConfigError(f"--checkpoint best: no checkpoint of {run} was evaluated. Try --checkpoint last.")
        return min(measured)[2]
    number = re.fullmatch(r"(?:step-)?(\d{1,18})", which)
    if number is None:
        raise ConfigError(
            f"--checkpoint {which}: expected last, best or a step.{did_you_mean(which, ['last', 'best'])}"
        )
    step = int(number[1])
    found = next((c.path for c in kept if c.step == step), None)
    if found is None:
        raise ConfigError(f"{run} has no checkpoint {step_name(step)}; it has {', '.join(str(c.step) for c in kept)}.")
    return found


def _checkpoints(run: Path) -> list[CheckpointRecord]:
    """The run's own checkpoints by step."""
    directory = RunDirectory(run)
    section = directory.read_config().get("checkpoint")
    name = section.get("dir") if isinstance(section, dict) else None
    kept = CheckpointStore(run / (name if isinstance(name, str) else "checkpoints"), "").checkpoints()
    run_id = directory.read_status().get("run_id")
    return [c for c in kept if not isinstance(run_id, str) or c.run_id == run_id]


def _run_above(path: Path) -> Path:
    for parent in path.parents:
        if (parent / "config.yaml").is_file():
            return parent
    raise ConfigError(f"{path}: no run directory (with a config.yaml) lies above it.")


def _not_a_run(path: Path) -> str:
    if (path / "multirun.yaml").is_file():
        runs = sorted((p.name for p in path.iterdir() if (p / "config.yaml").is_file()), key=lambda n: (len(n), n))
        return f"{path} is a sweep: name one of its runs, such as {path / (runs[0] if runs else '0')}."
    return f"{path} is not a run directory (no config.yaml), not a checkpoint (step-0000100) and not adapters/."


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()])
