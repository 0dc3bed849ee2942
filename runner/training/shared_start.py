"""What rank 0 tells the other ranks so that all begin a run equally: its spec, its state, and what it has cached."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from runner.common import safe_json
from runner.common.cores import usable_cores
from runner.common.errors import ConfigError
from runner.common.layout import ADAPTERS, UNAVERAGED
from runner.common.text import count
from runner.config import serialize
from runner.config.invocation import Supervision
from runner.config.schema import Config
from runner.distributed.frames import pack, unpack
from runner.models.device import on_cpu
from runner.runs.directory import RunDirectory
from runner.runs.run_spec import RunSpec
from runner.training import state_files
from runner.training.baseline import Baseline, validation_result, validation_values
from runner.training.components import Components
from runner.training.run_writer import FilePositions
from runner.training.train_state import TrainState
from runner.training.world import World

_FILES = (ADAPTERS, UNAVERAGED, state_files.OPTIMIZER, state_files.STATE)
_MAX_VALUES = 100_000
_NAMES = {
    "model": "the base model has other weights",
    "data_train": "the training data differ",
    "data_valid": "the validation data differ",
    "data_mix": "the sources of data.mix differ",
}


def send_spec(world: World, spec: RunSpec) -> None:
    """Tell the other ranks what is trained. Paths are the same on all machines; loggers are those of rank 0."""
    if world.size == 1:
        return
    told = {
        "config": {**serialize.to_dict(spec.config), "loggers": {}},
        "stored": {**spec.stored, "loggers": {}},
        "run": str(spec.directory.path),
        "run_id": spec.run_id,
        "stop_at": spec.stop_at,
        "precision": spec.precision,
        "supervise": asdict(spec.supervise) if spec.supervise else None,
    }
    world.broadcast(json.dumps(told).encode())


def receive_spec(world: World) -> RunSpec:
    """Wait for what rank 0 trains, and return it. Its directory is not one of this machine."""
    told = safe_json.parse(world.broadcast(None), max_values=_MAX_VALUES)
    config = serialize.from_dict(told["config"], "the config of rank 0")
    return RunSpec(
        config=config,
        stored=told["stored"],
        directory=RunDirectory(Path(told["run"]), config.checkpoint.dir),
        source=None,
        run_id=told["run_id"],
        stop_at=told["stop_at"],
        precision=told["precision"],
        supervise=Supervision(**told["supervise"]) if told["supervise"] else None,
    )


def compare_inputs(world: World, components: Components) -> list[str]:
    """Refuse ranks that have loaded other weights or rows than rank 0, and return what to log about their devices.

    Raises:
        ConfigError: names the rank and what differs.
    """
    if world.size == 1:
        return []
    identity = components.identity
    own = {"fingerprints": identity.fingerprints, "environment": serialize.flatten_dict(identity.numeric_environment)}
    all_ranks = [json.loads(content) for content in world.gather(json.dumps(own, default=str).encode())]
    first = all_ranks[0]
    problems = [
        f"rank {rank}: {text} from those of rank 0."
        for rank, other in enumerate(all_ranks)
        for name, text in _NAMES.items()
        if other["fingerprints"].get(name) != first["fingerprints"].get(name)
    ]
    if problems:
        advice = "Every machine needs the same model and data at the same path."
        raise ConfigError("\n".join([*problems, advice]))
    return [
        f"rank {rank} computes in another way than rank 0, so the last digits depend on who computes what: {names}"
        for rank, other in enumerate(all_ranks)
        if (names := ", ".join(_differences(first["environment"], other["environment"])))
    ]


def share_baseline(world: World, components: Components) -> None:
    """Give all ranks the loss before training that rank 0 has in its cache; where it has none, all compute it."""
    if world.size == 1:
        return
    own = components.baseline.validation
    content = world.broadcast(json.dumps(validation_values(own)).encode() if own is not None else None)
    if not world.is_first:
        found = safe_json.parse(content, max_values=len(content)) if content else {}
        components.baseline = Baseline(validation=validation_result(found))


def share_state(world: World, state: TrainState, window: int, components: Components) -> int:
    """Replace the state of the other ranks by rank 0's, sent as the files of a checkpoint; return its `window`."""
    if world.size == 1:
        return window
    if world.is_first:
        files = state_files.checkpoint_files(
            state,
            learning_rate=0.0,
            window=window,
            written=FilePositions(),
            identity=components.identity,
            adapted=components.adapted,
        )
        world.broadcast(pack([_bytes(files.get(name, b"")) for name in _FILES]))
        return window
    received = {name: file for name, file in zip(_FILES, unpack(world.broadcast(None)), strict=True) if file}
    saved = state_files.decode_state(received, "the state of rank 0")
    state_files.restore(state, saved, components.adapted, "the state of rank 0")
    return saved.window or window


def keep_equal(world: World, state: TrainState, window: int, components: Components) -> list[int]:
    """Give all ranks rank 0's state again where their weights have come apart; return the ranks that differed.

    All apply the same gradient, so equal machines stay equal to the last bit; another chip may round an update
    differently.
    """
    if world.size == 1:
        return []
    checksum = 0
    for array in state.params.values():
        checksum = zlib.crc32(np.asarray(array.reshape(-1).view(mx.uint8)).data, checksum)
    sums = [int(values[0]) for values in world.gather_arrays(np.array([checksum]))[0]]
    different = [rank for rank, found in enumerate(sums) if found != sums[0]]
    if different:
        share_state(world, state, window, components)
    return different


def describe_ranks(world: World, config: Config) -> list[str]:
    """Return lines for the log on how many ranks train, and which of them are of no use; none for a process alone."""
    if world.size == 1:
        return []
    rows = config.train.batch_size * config.train.grad_accumulation
    lines = [f"ranks  {world.size}, each with its share of every batch of {config.train.batch_size} rows"]
    if rows < world.size:
        lines.append(
            f"ranks  an update has {count(rows, 'row')}: only {rows} of {world.size} ranks have something to compute"
        )
    if on_cpu() and world.local > (cores := usable_cores()):
        lines.append(f"ranks  {world.local} on this machine share {count(cores, 'core')}: fewer of them are faster")
    return lines


def with_own_share(spec: RunSpec, world: World) -> RunSpec:
    """Return `spec` as if the run had only as many rows a batch as one rank: what its memory is estimated from."""
    train = spec.config.train
    rows = -(-train.batch_size // world.size)
    return replace(spec, config=replace(spec.config, train=replace(train, batch_size=rows)))


def _bytes(content: Any) -> bytes:
    content = content() if callable(content) else content
    return content if isinstance(content, bytes) else b"".join(content)


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
