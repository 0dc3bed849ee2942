"""`runner verify --replay`: train again, aside, from one kept checkpoint to the next, and compare the two.

On the CPU the two have to be equal bit for bit. A GPU may compute the same step with other last bits: there the
stretch is trained twice, and the difference has to lie within a few times what these two differ by.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from runner.backends.cpu.blas import THREAD_VARIABLES
from runner.checkpoints import verify
from runner.checkpoints.safetensors_file import unpack
from runner.checkpoints.store import step_name
from runner.checkpoints.verify import LoadedCheckpoint
from runner.cli.commands import stored_settings
from runner.common.cache_dir import cache_dir
from runner.common.errors import ConfigError
from runner.common.filesystem import FileSystem
from runner.config import validation
from runner.config.schema import Config
from runner.runs.directory import RunDirectory
from runner.runs.layout import ADAPTERS
from runner.runs.rows import read_rows
from runner.runs.run_spec import ResumeSource, RunSpec, new_run_id

NOISE_FACTOR = 4.0
"""How many times the difference of two replays on a GPU a stored checkpoint may be away from them."""
_STATE, _OPTIMIZER = "train_state.json", "optimizer.safetensors"
_PROGRESS = ("step", "tokens")
_ROW_FIELDS = ("step", "split", "loss", "learning_rate", "grad_norm", "epoch", "tokens", "supervised_tokens")


def replay(run: Path, whole: list[int], start: int | None = None) -> dict[str, Any]:
    """Train `run` again between two of its `whole` checkpoints, the last two where `start` names none.

    A run with a single checkpoint is trained from its beginning. Returns `from`, `to`, `reproduced`, `told` (a
    sentence) and `differences`.

    Raises:
        ConfigError: there is no such pair.
        RunnerError: the run cannot be trained here: its model or its data are gone or are others.
    """
    first, last = pair(run, whole, start)
    folder = RunDirectory(run, _checkpoints_name(run)).checkpoints
    target = verify.load_checkpoint(folder / step_name(last), FileSystem())
    then = json.loads(target.files[_STATE])
    _set_threads(then["environment"])
    window = then["position"].get("window")  # older checkpoints: the settings say it
    scratch = Path(tempfile.mkdtemp(prefix="replay-", dir=_made(cache_dir())))
    try:
        made = _train(run, folder, first, last, scratch / "1", window)
        noise: dict[str, float] | None = None
        if "cpu" not in str(made[1]["environment"]["device"]):
            again = _train(run, folder, first, last, scratch / "2", window)
            noise = differences(made[0], again[0])
        found = _compare(run, target, then, *made, scratch / "1", noise)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    stretch = f"steps {first} to {last} trained again"
    others = _environment(then["environment"], made[1]["environment"])
    if found:
        told = f"{stretch}: NOT the same: {'; '.join(found)}" + (f" ({'; '.join(others)})" if others else "")
    else:
        told = f"{stretch}: " + ("the same, bit for bit" if noise is None else "the same within this device's noise")
    return {"from": first, "to": last, "reproduced": not found, "told": told, "differences": found, "noise": noise}


def pair(run: Path, whole: list[int], start: int | None) -> tuple[int, int]:
    """The steps to train between. Raises ConfigError where there are none."""
    if not whole:
        raise ConfigError(f"{run} has no checkpoint to compare with.")
    if start is None:
        return (whole[-2] if len(whole) > 1 else 0), whole[-1]
    later = [step for step in whole if step > start]
    if start not in (0, *whole) or not later:
        known = ", ".join(str(step) for step in (0, *whole[:-1]))
        raise ConfigError(f"--from {start}: {run} can be trained again from step {known}.")
    return start, later[0]


def differences(one: LoadedCheckpoint, other: LoadedCheckpoint) -> dict[str, float]:
    """The largest difference of each file's tensors, relative to the largest value; 0.0 where the bytes are equal."""
    found = {}
    for name in (ADAPTERS, _OPTIMIZER):
        if one.files[name] == other.files[name]:
            found[name] = 0.0
            continue
        first, second = (unpack(loaded.files[name], where=name)[0] for loaded in (one, other))
        if {n: (t.dtype, t.shape) for n, t in first.items()} != {n: (t.dtype, t.shape) for n, t in second.items()}:
            found[name] = float("inf")
            continue
        worst = 0.0
        for tensor in first:
            a, b = (_float(tensors[tensor]) for tensors in (first, second))
            if a.size:
                worst = max(worst, float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-30)))
        found[name] = worst
    return found


def _float(tensor: Any) -> np.ndarray:
    bits = tensor.array()
    if tensor.dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)


def _train(
    run: Path, folder: Path, first: int, last: int, scratch: Path, window: int | None
) -> tuple[LoadedCheckpoint, dict[str, Any]]:
    from runner.backends.cpu import blas

    report = blas.load_blas()
    from runner.training.run import run as train

    chosen = _settings(run)
    if not first:  # what data.window=null chose then, not what it would choose here
        chosen.data.window = window or chosen.data.window
    stored = RunDirectory(run).read_config()
    directory = RunDirectory(scratch, chosen.checkpoint.dir)
    directory.claim()
    source = ResumeSource(run=run.absolute(), checkpoint=(folder / step_name(first)).absolute()) if first else None
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        try:
            train(RunSpec(chosen, stored, directory, source, new_run_id(), stop_at=last, label="replay"), report)
        except SystemExit as stopped:  # a signal: nothing to compare
            raise KeyboardInterrupt from stopped
    made = verify.load_checkpoint(directory.checkpoints / step_name(last), FileSystem())
    return made, json.loads(made.files[_STATE])


def _settings(run: Path) -> Config:
    """The run's own settings, without what only costs time or writes elsewhere."""
    chosen = validation.fill_defaults(stored_settings.read_settings(run).config)
    chosen.loggers = {}
    chosen.checkpoint.backup = None
    chosen.data.metric_rows = 0
    return chosen


def _compare(
    run: Path,
    target: LoadedCheckpoint,
    then: Mapping[str, Any],
    made: LoadedCheckpoint,
    now: Mapping[str, Any],
    scratch: Path,
    noise: Mapping[str, float] | None,
) -> list[str]:
    found = []
    for name, far in differences(target, made).items():
        if far > (NOISE_FACTOR * noise[name] if noise else 0.0):
            found.append(f"{name} differs by up to {far:.1e} of its largest value")
    for name, was in {**then["position"], "random_state": then["random_state"]}.items():
        is_ = now[name] if name == "random_state" else now["position"][name]
        if was != is_:
            found.append(f"{name} was {was}, is {is_}")
    for name in _PROGRESS:
        a, b = then["progress"][name], now["progress"][name]
        if a != b:
            found.append(f"{name} was {a}, is {b}")
    if noise is None:
        found += _rows(run / "metrics.jsonl", scratch / "metrics.jsonl", then["metrics_offset"])
    return found


def _rows(then: Path, now: Path, size: int) -> list[str]:
    """Training and validation rows that both wrote for the same step have to agree; intervals may differ."""
    ours = {(row["step"], row.get("split")): row for row in read_rows(now)}
    for row in read_rows(then, size):
        mine = ours.get((row["step"], row.get("split")))
        if mine is None or "loss" not in row or "loss" not in mine:
            continue
        if row["split"] == "train" and row.get("supervised_tokens") != mine.get("supervised_tokens"):
            continue
        for name in _ROW_FIELDS:
            if row.get(name) != mine.get(name):
                return [
                    f"{name} of the {row['split']} row of step {row['step']} was {row.get(name)}, is {mine.get(name)}"
                ]
    return []


def _environment(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What computed it then and now, where it differs: a reason for other bits."""
    return [f"{name} was {then[name]}, is {now.get(name)}" for name in then if then[name] != now.get(name)]


def _set_threads(environment: Mapping[str, Any]) -> None:
    """The BLAS threads that the checkpoint was computed with, unless the environment names others."""
    blas = environment.get("blas")
    threads = blas.get("threads") if isinstance(blas, Mapping) else None
    if isinstance(threads, int) and not any(name in os.environ for name in THREAD_VARIABLES):
        os.environ["OPENBLAS_NUM_THREADS"] = str(threads)


def _checkpoints_name(run: Path) -> str:
    return stored_settings.read_settings(run).config.checkpoint.dir


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
