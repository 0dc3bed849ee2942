"""The adapter that a path on the command line means: a run's result or a checkpoint, read and verified. No MLX."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.checkpoints import manifest, verify
from runner.checkpoints.retention import best_checkpoint, rank_checkpoints
from runner.checkpoints.safetensors_file import read_header
from runner.checkpoints.store import CheckpointStore, step_name
from runner.checkpoints.verify import CheckpointRecord
from runner.cli.run_argument import resolve_name
from runner.common import safe_json
from runner.common.errors import CheckpointError, ConfigError, did_you_mean
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS, CHECKPOINTS, STEP_NAME
from runner.runs.directory import RunDirectory
from runner.runs.find import run_or_best_job

_MAX_ADAPTER_BYTES = 1 << 40
_MAX_CONFIG_BYTES = 1 << 20
_MAX_CONFIG_VALUES = 10_000


@dataclass(frozen=True)
class AdapterSource:
    """One adapter of a run: its weights and its config, as bytes that were verified where a manifest exists."""

    run: Path
    """The run directory."""
    folder: Path
    """The folder of the adapter: a checkpoint or the run's adapters/."""
    step: int | None
    """The update after which it was saved; None where the run does not say."""
    is_result: bool
    """Whether it is the run's result, and not a checkpoint that was named."""
    adapters: bytes
    """Content of adapters.safetensors."""
    adapter_config: dict[str, Any]
    """Content of adapter_config.json."""

    @property
    def name(self) -> str:
        """`step 40`, or `result` where the step is not known."""
        return "result" if self.step is None else f"step {self.step}"


def find_adapter(path: Path, checkpoint: str | None = None) -> AdapterSource:
    """Find and read the adapter that `path` means: a run directory (its result), a sweep (the result of its best job),
    a checkpoint, or an adapters/ folder.

    Args:
        path: the path that was typed.
        checkpoint: `last`, `best` or a step: that checkpoint of the run instead of its result.

    Raises:
        ConfigError: `path` holds no adapter; the message says what it holds.
        CheckpointError: the adapter is damaged.
    """
    path = resolve_name(str(path)).absolute()
    if not path.exists():
        raise ConfigError(f"{path}: there is no such directory.{_similar_name(path)}")
    path = run_or_best_job(path)
    is_result = path.name == "adapters"
    if is_result or STEP_NAME.fullmatch(path.name):
        if checkpoint is not None:
            raise ConfigError(f"--checkpoint chooses one of a run's checkpoints, and {path} is not a run directory.")
        run = _run_above(path)
        return _read_result(run, path) if is_result else _read_checkpoint(run, path)
    if not (path / "config.yaml").is_file():
        raise ConfigError(_not_a_run(path))
    if checkpoint is not None:
        return _read_checkpoint(path, _choose_checkpoint(path, checkpoint))
    return _read_result(path, path / "adapters")


def find_average(path: Path, choice: str) -> list[AdapterSource]:
    """Return the checkpoints that `choice` means, `last:N` or `best:N`, of the run at `path`, by step.

    Raises:
        ConfigError: another choice, or the run has too few checkpoints.
        CheckpointError: one of them is damaged.
    """
    match = re.fullmatch(r"(last|best):(\d{1,4})", choice)
    if match is None or int(match[2]) < 2:
        raise ConfigError(f"--average {choice} is invalid: must be last:N or best:N, of 2 checkpoints or more.")
    run = run_or_best_job(resolve_name(str(path)).absolute())
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"--average takes a run directory: {_not_a_run(run)}")
    count, found = int(match[2]), _checkpoints(run)
    if match[1] == "best":
        ranked = rank_checkpoints(checkpoint.manifest for checkpoint in found)
        steps = {manifest.step for manifest in ranked[:count]}
        found = [checkpoint for checkpoint in found if checkpoint.manifest.step in steps]
    if len(found) < count:
        evaluated = " that were evaluated" if match[1] == "best" else ""
        raise ConfigError(
            f"--average {choice}: {run} has {len(found)} checkpoints{evaluated}. More are retained with "
            "checkpoint.keep_last, checkpoint.keep_best and checkpoint.keep_every."
        )
    return [_read_checkpoint(run, checkpoint.path) for checkpoint in found[-count:]]


def find_best(run: Path) -> AdapterSource:
    """Return the checkpoint of `run` with the lowest validation loss, or the newest where none was evaluated."""
    evaluated = best_checkpoint(checkpoint.manifest for checkpoint in _checkpoints(run))
    return _read_checkpoint(run, _choose_checkpoint(run, "best" if evaluated else "last"))


def _read_checkpoint(run: Path, folder: Path) -> AdapterSource:
    loaded = verify.load_checkpoint(folder, FileSystem())
    for name in (ADAPTERS, ADAPTER_CONFIG):
        if name not in loaded.files:
            raise CheckpointError(f"{folder}: its manifest lists no {name}.")
    config = _parse_config(loaded.files[ADAPTER_CONFIG], folder)
    return AdapterSource(run, folder, loaded.checkpoint.step, False, loaded.files[ADAPTERS], config)


def _read_result(run: Path, folder: Path) -> AdapterSource:
    if not (folder / ADAPTERS).exists():
        steps = ", ".join(str(checkpoint.step) for checkpoint in _checkpoints(run))
        available = f"Its checkpoints: {steps}; --checkpoint last uses the newest." if steps else "It has none yet."
        state = RunDirectory(run).read_status()["state"]
        raise ConfigError(f"{run} has no result (adapters/): it is {state}. {available}")
    disk = FileSystem()
    if disk.lstat(folder / manifest.NAME):
        return replace(_read_checkpoint(run, folder), is_result=True)
    # Without a manifest: written by an older version, or changed by another program.
    read_header(folder / ADAPTERS)  # refuse a hostile file before its bytes fill the memory
    adapters = disk.read_file(folder / ADAPTERS, _MAX_ADAPTER_BYTES)
    config = _parse_config(disk.read_file(folder / ADAPTER_CONFIG, _MAX_CONFIG_BYTES), folder)
    step = RunDirectory(run).read_status().get("result_step")
    return AdapterSource(run, folder, step if isinstance(step, int) else None, True, adapters, config)


def _parse_config(data: bytes, folder: Path) -> dict[str, Any]:
    try:
        return safe_json.parse_object(data, max_values=_MAX_CONFIG_VALUES)
    except ValueError as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {error}.") from None


def _choose_checkpoint(run: Path, choice: str) -> Path:
    """Return the folder of the checkpoint of `run` that `choice` (`last`, `best` or a step) means."""
    checkpoints = _checkpoints(run)
    if not checkpoints:
        raise ConfigError(f"{run} has no checkpoints.")
    paths = {checkpoint.step: checkpoint.path for checkpoint in checkpoints}
    if choice == "last":
        return checkpoints[-1].path
    if choice == "best":
        best = best_checkpoint(checkpoint.manifest for checkpoint in checkpoints)
        if best is None:
            raise ConfigError(f"--checkpoint best: no checkpoint of {run} was evaluated. Try --checkpoint last.")
        return paths[best.step]
    match = re.fullmatch(r"(?:step-)?(\d{1,18})", choice)
    if match is None:
        hint = did_you_mean(choice, ["last", "best"])
        raise ConfigError(f"--checkpoint {choice} is invalid: must be last, best or a step.{hint}")
    step = int(match[1])
    if step in paths:
        return paths[step]
    steps = ", ".join(map(str, paths))
    raise ConfigError(f"{run} has no checkpoint {step_name(step)}; it has {steps}.")


def _checkpoints(run: Path) -> list[CheckpointRecord]:
    """Return the run's own checkpoints by step; those of another run in its folder are left out."""
    directory = RunDirectory(run)
    section = directory.read_config().get("checkpoint")
    name = section.get("dir") if isinstance(section, dict) else None
    store = CheckpointStore(run / (name if isinstance(name, str) else CHECKPOINTS), "")
    run_id = directory.read_status().get("run_id")
    return [c for c in store.checkpoints() if not isinstance(run_id, str) or c.manifest.run_id == run_id]


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


def _similar_name(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()])
