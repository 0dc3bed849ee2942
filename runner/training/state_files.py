"""A member's whole state as the files of a checkpoint, and back. What is packed here decides that resume is exact."""

from __future__ import annotations

import json
import math
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
from runner.common.safe_json import quoted
from runner.data.order import DataPosition
from runner.models.arrays import parse_arrays
from runner.models.lora import Params
from runner.runs.layout import ADAPTER_CONFIG, ADAPTERS
from runner.training.optimizer import NonFiniteArray, require_same_arrays
from runner.training.train_state import Progress, TrainState
from runner.training.train_step import dropout_seed

OPTIMIZER = "optimizer.safetensors"
STATE = "train_state.json"
SCHEMA = 1
_MOST_VALUES = 100_000  # in train_state.json; a real one has about 150
_LARGEST = 1 << 62


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint records of the run it belongs to, to be compared on resume."""

    run_id: str
    fingerprints: dict[str, str]
    """data_train, data_valid, model, config: a difference refuses the resume."""
    environment: dict[str, Any]
    """Versions, device, BLAS, compiled: a difference is named, since bits may then differ."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """The settings, flat."""


@dataclass(frozen=True)
class SavedState:
    """A checkpoint, read and checked."""

    params: Params
    optimizer: dict[str, mx.array]
    progress: Progress
    position: DataPosition
    window: int | None
    """Batches sorted by length together; None in older checkpoints, whose settings say it."""
    metrics_offset: int
    samples_offset: int
    identity: RunIdentity
    seconds: float
    """Wall time that the run had taken."""


def checkpoint_files(
    member: TrainState, position: DataPosition, window: int, identity: RunIdentity, adapter_config: Mapping[str, Any]
) -> dict[str, Content | Callable[[], Content]]:
    """The files of `member`'s checkpoint, or what makes them in any thread from views of its arrays, which are
    evaluated here, on the training thread. `window` is that of the order of training, without which `position` says
    nothing.

    Raises:
        Diverged: an array is not finite: such a checkpoint could not be read, and must not push out one that can.
    """
    progress = member.progress
    try:
        arrays, optimizer = member.optimizer.tensors(member.params)
    except NonFiniteArray as error:
        raise Diverged(f"{error} is not finite after update {progress.step}; that state was not saved.") from None
    seed = dropout_seed(member.seed, progress.step + 1, 0)
    state = {
        "schema": SCHEMA,
        "step": progress.step,
        "position": {"epoch": position.epoch, "batch": position.batch, "window": window},
        "random_state": [seed >> 32, seed & 0xFFFFFFFF],
        "progress": progress.to_dict(),
        "metrics": {
            "train_loss": progress.train_loss,
            "valid_loss": progress.valid_loss if progress.valid_step == progress.step else None,
            "learning_rate": member.learning_rate(progress.step),
        },
        "metrics_offset": member.record.metrics.offset,
        "samples_offset": member.record.samples.offset,
        "seconds": round(member.record.seconds(), 3),
        "fingerprints": identity.fingerprints,
        "environment": identity.environment,
        "hyperparameters": identity.hyperparameters,
    }
    return {
        ADAPTERS: partial(pieces, arrays, {"format": "mlx"}),
        ADAPTER_CONFIG: json_bytes(adapter_config),
        OPTIMIZER: partial(pieces, optimizer, {"format": "mlx"}),
        STATE: json_bytes(state),
    }


def read_state(loaded: LoadedCheckpoint) -> SavedState:
    """The state in a verified checkpoint, with its own checks: JSON shape, finite values.

    Raises:
        CheckpointError: names the file and the reason.
    """
    where = str(loaded.checkpoint.path)
    try:
        params = parse_arrays(loaded.files[ADAPTERS], where=f"{where}/{ADAPTERS}")
        optimizer = parse_arrays(loaded.files[OPTIMIZER], where=f"{where}/{OPTIMIZER}")
        data = safe_json.parse(loaded.files[STATE], most_values=_MOST_VALUES)
        if data["schema"] != SCHEMA:
            raise CheckpointError(f"{where}/{STATE} has schema {quoted(data['schema'])}; this version reads {SCHEMA}.")
        progress = Progress.from_dict(data["progress"])
        position = DataPosition(_count(data["position"], "epoch"), _count(data["position"], "batch"))
        if progress.step != loaded.checkpoint.step:
            raise CheckpointError(f"{where}/{STATE} is not of step {loaded.checkpoint.step}.")
        return SavedState(
            params=params,
            optimizer=optimizer,
            progress=progress,
            position=position,
            window=_window(data["position"]),
            metrics_offset=_count(data, "metrics_offset"),
            samples_offset=_count(data, "samples_offset"),
            identity=RunIdentity(
                run_id=loaded.checkpoint.run_id,
                fingerprints={name: _text(value, name) for name, value in dict(data["fingerprints"]).items()},
                environment=dict(data["environment"]),
                hyperparameters=dict(data["hyperparameters"]),
            ),
            seconds=_seconds(data),
        )
    except KeyError as error:
        raise CheckpointError(f"{where} lacks {error.args[0]}.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}/{STATE} cannot be understood: {' '.join(str(error).split())[:200]}") from None


def _count(data: Mapping[str, Any], name: str) -> int:
    value = data[name]
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise ValueError(f"{name} is not a whole number from 0")
    return value


def _window(data: Mapping[str, Any]) -> int | None:
    if "window" in data and _count(data, "window") == 0:
        raise ValueError("window is 0")
    return data.get("window")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the fingerprint {quoted(name)} is not a text")
    return value


def _seconds(data: Mapping[str, Any]) -> float:
    value = data["seconds"]
    if type(value) not in (int, float) or value < 0:
        raise ValueError("seconds is not a number from 0")
    return float(value)


def restore(member: TrainState, restored: SavedState, where: str) -> None:
    """Put a checkpoint's state into `member`.

    Raises:
        CheckpointError: arrays of other names, shapes or dtypes than the member has.
    """
    require_same_arrays(restored.params, member.params, "the adapter", where)
    member.params = {name: restored.params[name] for name in member.params}
    member.optimizer.restore(restored.optimizer, where)
    member.progress = restored.progress


def json_bytes(data: Any) -> bytes:
    """Readable JSON; numbers that are not finite become null, since JSON has none."""
    return (json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
