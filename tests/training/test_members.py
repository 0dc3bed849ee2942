"""The loop does not assume that there is one adapter: members that share the batches equal their solo runs."""

from __future__ import annotations

import dataclasses
import json

import mlx.core as mx

from runner.backends.cpu import blas
from runner.checkpoints.retention import RetentionPolicy
from runner.checkpoints.store import CheckpointStore
from runner.config import schema
from runner.reports.progress import Display
from runner.runs.directory import RunDirectory
from runner.runs.run_spec import RunSpec, new_run_id
from runner.training import build, components, optimizer, trainer
from runner.training.run_writer import RunWriter
from runner.training.shared import SharedComponents
from runner.training.signals import StopSignals
from runner.training.train_state import TrainState


def a_record(folder) -> RunWriter:
    directory = RunDirectory(folder)
    directory.claim()
    record = RunWriter(directory, CheckpointStore(directory.checkpoints, new_run_id()), RetentionPolicy(3, 1))
    record.open()
    return record


def test_two_members_with_other_learning_rates_equal_their_solo_runs_bit_for_bit(tiny, train, tmp_path, rows):
    settings = tiny(**{"lora.dropout": 0.2, "train.grad_accumulation": 2})
    rates = (1e-3, 5e-3)
    with Display(tmp_path / "log", settings.train.iters, lambda: 0.0) as display, StopSignals() as stops:
        parts = components.load_components(
            settings, schema.to_dict(settings), blas.load_blas(), SharedComponents(), display, stops
        )
        start = RunSpec(settings, schema.to_dict(settings), RunDirectory(tmp_path), None, new_run_id())
        job = build.build_trainer(start, None, parts, a_record(tmp_path / "pair0"), stops, display)
        first = job.members[0]
        job.members = []
        for i, rate in enumerate(rates):
            record = first.record if i == 0 else a_record(tmp_path / f"pair{i}")
            params = {name: mx.array(array) for name, array in first.params.items()}
            own = dataclasses.replace(settings.optimizer, learning_rate=rate)
            constant = (lambda r: lambda update: r)(rate)
            job.members.append(
                TrainState(params, optimizer.build_optimizer(own, params), constant, settings.seed, record)
            )
        assert trainer.train(job) == trainer.FINISHED
        for member in job.members:
            member.record.close()
        parts.adapted.remove()
    for i, rate in enumerate(rates):
        solo = train(tiny(**{"lora.dropout": 0.2, "train.grad_accumulation": 2, "optimizer.learning_rate": rate}),
                         tmp_path / f"solo{i}")  # fmt: skip
        assert rows(tmp_path / f"pair{i}") == rows(solo)
        last = "checkpoints/step-0000012"
        for name in ("adapters.safetensors", "optimizer.safetensors"):
            assert (tmp_path / f"pair{i}/{last}/{name}").read_bytes() == (solo / last / name).read_bytes()
        states = [json.loads((run / last / "train_state.json").read_text()) for run in (tmp_path / f"pair{i}", solo)]
        assert states[0]["progress"] == states[1]["progress"]
