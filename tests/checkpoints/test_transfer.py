"""A run packed on one machine and unpacked on another is the same run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.checkpoints.transfer import checkpoint_hashes, pack, unpack
from runner.common.errors import CheckpointError, StorageError
from runner.runs.directory import RunDirectory


@pytest.fixture
def run(tiny, train_once, tmp_path):
    return RunDirectory(train_once(tiny(), tmp_path / "run"))


def test_a_run_that_was_unpacked_elsewhere_continues_to_an_equal_one(tiny, train, tmp_path, assert_equal_runs):
    settings = tiny(**{"checkpoint.keep_last": 2})
    part = RunDirectory(train(settings, tmp_path / "part", stop_at=6))
    there = RunDirectory(tmp_path / "there")
    unpack(pack(part, {}), there)
    train(settings, there.path, resume=there.path)
    assert_equal_runs(there.path, train(settings, tmp_path / "whole"))
    # And back: what was removed there is removed here, and what is here already is not sent.
    packed = pack(there, checkpoint_hashes(part))
    unpack(packed, part)
    assert checkpoint_hashes(part) == checkpoint_hashes(there)
    assert_equal_runs(part.path, there.path)


def test_known_checkpoints_are_not_sent_and_a_run_in_progress_without_its_result(run):
    packed = pack(run, checkpoint_hashes(run), in_progress=True)
    assert not packed.checkpoints and packed.all_checkpoints
    assert not [name for name in packed.files if name.startswith("adapters/")]
    assert ".lock" not in packed.files and "metrics.jsonl" in packed.files
    assert [name for name in pack(run, {}).files if name.startswith("adapters/")]


def test_a_damaged_checkpoint_and_a_name_that_leads_out_are_refused(run, tmp_path):
    packed, there = pack(run, {}), RunDirectory(tmp_path / "there")
    name, files = next(iter(packed.checkpoints.items()))
    damaged = {name: {**files, "adapters.safetensors": files["adapters.safetensors"][:-1] + b"?"}}
    with pytest.raises(CheckpointError, match=r"step-\d+: it arrived damaged"):
        unpack(replace(packed, checkpoints=damaged), there)
    for outside in ("../outside", "/outside"):
        with pytest.raises(StorageError, match="leads out of the directory"):
            unpack(replace(packed, files={outside: b""}), there)
    with pytest.raises(CheckpointError, match="no name of a checkpoint"):
        unpack(replace(packed, checkpoints={"../step-1": {}}), there)
