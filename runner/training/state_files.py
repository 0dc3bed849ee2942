"""The train state as the files of a checkpoint, and back: what is stored here makes a resume exact."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from runner.checkpoints.safetensors_file import pieces
from runner.checkpoints.verify import LoadedCheckpoint
from runner.common import safe_json
from runner.common.errors import CheckpointError, Diverged
from runner.common.filesystem import Content
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS, UNAVERAGED
from runner.common.safe_json import quoted
from runner.data.order import DataPosition
from runner.models.arrays import parse_arrays
from runner.models.dropout import dropout_seed
from runner.models.lora import AdaptedModel, Params
from runner.models.precision import recorded_precision
from runner.training.optimizer import NonFiniteArray, require_same_arrays
from runner.training.run_writer import FilePositions
from runner.training.train_state import Progress, TrainState

OPTIMIZER = "optimizer.safetensors"
STATE = "train_state.json"
SCHEMA = 1
_MAX_VALUES = 100_000  # in train_state.json, which usually has about 150


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint records about its run, to be compared with the run that resumes from it."""

    fingerprints: dict[str, str]
    """Of data_train, data_valid, model and config: a difference refuses the resume."""
    numeric_environment: dict[str, Any]
    """Versions, device, BLAS and the like: a difference is logged, since results may differ in the last digits."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """The config, flat."""
    precision: dict[str, str] = field(default_factory=dict)
    """The dtype and dequantize of the base model, neither of them `auto`: a resume keeps them on any device."""


@dataclass(frozen=True)
class SavedState:
    """The decoded and checked state of a checkpoint."""

    params: Params
    average: Params | None
    """With weight averaging, the mean of `params` so far."""
    optimizer: dict[str, mx.array]
    progress: Progress
    position: DataPosition
    window: int | None
    """Batches sorted by length together; None in older checkpoints, whose config has it."""
    written: FilePositions
    identity: RunIdentity


def checkpoint_files(
    state: TrainState,
    *,
    learning_rate: float,
    window: int,
    written: FilePositions,
    identity: RunIdentity,
    adapted: AdaptedModel,
) -> dict[str, Content | Callable[[], Content]]:
    """Return the files of a checkpoint of `state`.

    Arrays are evaluated here, on the training thread; the callables encode views of them and may run on another one.

    Args:
        learning_rate: that of the last update.
        window: batches sorted by length together, without which the data position has no meaning.

    Raises:
        Diverged: an array has NaN or Inf. Such a checkpoint could not be read and must not replace one that can.
    """
    progress, position = state.progress, state.position
    try:
        weights, optimizer = state.optimizer.tensors(state.params)
        average = state.average and state.average.tensors()
    except NonFiniteArray as error:
        raise Diverged(f"{error} is not finite after update {progress.step}; that state was not saved.") from None
    seed = dropout_seed(state.seed, progress.step + 1, 0)
    document = {
        "schema": SCHEMA,
        "step": progress.step,
        "position": {"epoch": position.epoch, "batch": position.batch, "window": window},
        "random_state": [seed >> 32, seed & 0xFFFFFFFF],
        "progress": progress.to_dict(),
        "metrics": {
            "train_loss": progress.train_loss,
            "valid_loss": progress.current_valid_loss,
            "learning_rate": learning_rate,
        },
        "metrics_offset": written.metrics_offset,
        "samples_offset": written.samples_offset,
        "row_losses_offset": written.row_losses_offset,
        "seconds": round(written.seconds, 3),
        "fingerprints": identity.fingerprints,
        "environment": identity.numeric_environment,
        "precision": identity.precision,
        "hyperparameters": identity.hyperparameters,
    }
    unaveraged = {UNAVERAGED: partial(pieces, adapted.to_stored(weights), {"format": "mlx"})} if average else {}
    return {
        ADAPTERS: partial(pieces, adapted.to_stored(average or weights), {"format": "mlx"}),
        **unaveraged,
        ADAPTER_CONFIG: _json_bytes(adapted.adapter_config()),
        OPTIMIZER: partial(pieces, optimizer, {"format": "mlx"}),
        STATE: _json_bytes(document),
    }


def read_params(loaded: LoadedCheckpoint) -> Params:
    """Return the adapter weights of a verified checkpoint.

    Raises:
        CheckpointError: names the file and the reason.
    """
    return parse_arrays(loaded.files[ADAPTERS], source=f"{loaded.checkpoint.path}/{ADAPTERS}")


def read_state(loaded: LoadedCheckpoint) -> SavedState:
    """Decode the state of a verified checkpoint and check its types and that all values are finite.

    Raises:
        CheckpointError: names the file and the reason.
    """
    return decode_state(loaded.files, str(loaded.checkpoint.path), loaded.checkpoint.step)


def decode_state(files: Mapping[str, bytes], path: str, step: int | None = None) -> SavedState:
    """Return the state that `checkpoint_files` encoded, of update `step` where one is given; `path` is named in errors.

    Raises:
        CheckpointError: names the file and the reason.
    """
    try:
        params, average = parse_arrays(files[ADAPTERS], source=f"{path}/{ADAPTERS}"), None
        if UNAVERAGED in files:
            params, average = parse_arrays(files[UNAVERAGED], source=f"{path}/{UNAVERAGED}"), params
        optimizer = parse_arrays(files[OPTIMIZER], source=f"{path}/{OPTIMIZER}")
        data = safe_json.parse(files[STATE], max_values=_MAX_VALUES)
        if data["schema"] != SCHEMA:
            raise CheckpointError(f"{path}/{STATE} has schema {quoted(data['schema'])}; this version reads {SCHEMA}.")
        progress = Progress.from_dict(data["progress"])
        position = DataPosition(_count(data["position"], "epoch"), _count(data["position"], "batch"))
        if step is not None and progress.step != step:
            raise CheckpointError(f"{path}/{STATE} is not of step {step}.")
        return SavedState(
            params=params,
            average=average,
            optimizer=optimizer,
            progress=progress,
            position=position,
            window=_window(data["position"]),
            written=_file_positions(data),
            identity=RunIdentity(
                fingerprints={name: _text(value, name) for name, value in dict(data["fingerprints"]).items()},
                numeric_environment=dict(data["environment"]),
                hyperparameters=dict(data["hyperparameters"]),
                precision=recorded_precision(data.get("precision"), data["environment"].get("device")),
            ),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]}.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}/{STATE} cannot be read: {' '.join(str(error).split())[:200]}") from None


def restore(state: TrainState, saved: SavedState, adapted: AdaptedModel, source: str) -> None:
    """Replace `state` by a saved one, and what `adapted` starts from; `source` is named in errors.

    Raises:
        CheckpointError: arrays differ from the run's in name, shape or dtype.
    """
    if state.average is not None:
        if saved.average is None and saved.progress.step > saved.progress.skipped_updates:
            raise CheckpointError(f"{source} lacks {UNAVERAGED}, but train.averaging_power is set.")
        state.average.restore(None if saved.average is None else _fitting(saved.average, state, adapted, source))
    state.params = _fitting(saved.params, state, adapted, source)
    state.optimizer.restore(saved.optimizer, source)
    state.progress, state.position = saved.progress, saved.position


def _fitting(stored: Params, state: TrainState, adapted: AdaptedModel, source: str) -> Params:
    """Return the stored arrays as those of `state`, in their order."""
    params = adapted.from_stored(stored)
    require_same_arrays(params, state.params, "the adapter", source)
    return {name: params[name] for name in state.params}


def _file_positions(data: Mapping[str, Any]) -> FilePositions:
    return FilePositions(
        metrics_offset=_count(data, "metrics_offset"),
        samples_offset=_count(data, "samples_offset"),
        # Earlier versions wrote no such file.
        row_losses_offset=_count(data, "row_losses_offset") if "row_losses_offset" in data else 0,
        seconds=_seconds(data),
    )


def _count(data: Mapping[str, Any], name: str) -> int:
    value = data[name]
    if not safe_json.is_count(value):
        raise ValueError(f"{name} is invalid: must be a whole number from 0")
    return value


def _window(data: Mapping[str, Any]) -> int | None:
    if "window" in data and _count(data, "window") == 0:
        raise ValueError("window is invalid: must be 1 or more")
    return data.get("window")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the fingerprint {quoted(name)} is invalid: must be text")
    return value


def _seconds(data: Mapping[str, Any]) -> float:
    value = data["seconds"]
    if type(value) not in (int, float) or value < 0:
        raise ValueError("seconds is invalid: must be a number from 0")
    return float(value)


def _json_bytes(data: Any) -> bytes:
    """Encode readable JSON, with null for NaN and Inf, which JSON lacks."""
    return (json.dumps(safe_json.to_json_values(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
