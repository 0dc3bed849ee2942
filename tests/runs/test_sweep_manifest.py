"""Numbers and folders follow the order of addition for good; every job has its config; a torn record does not count."""

from __future__ import annotations

import json

import pytest

from runner.common.errors import ConfigError
from runner.config import serialize
from runner.runs import sweep_manifest
from runner.runs.sweep_manifest import SweepJob, SweepManifest


def job(number: int, tiny, **settings) -> SweepJob:
    """A job whose config is that of `tiny` with these settings."""
    overrides = tuple(f"{name}={value}" for name, value in settings.items())
    config = serialize.to_dict(tiny(**settings))
    del config["model"]["trust_remote_code"]
    return SweepJob(number, str(number), overrides, config, {"lora": "all_linear"})


def read(manifest: SweepManifest) -> SweepManifest:
    return sweep_manifest.read_manifest(manifest.folder)


def test_numbers_follow_the_order_of_addition_and_every_job_has_its_config(tmp_path, tiny):
    manifest = sweep_manifest.read_manifest(tmp_path)
    first = [job(0, tiny, seed=1), job(1, tiny, **{"seed": 1, "lora.rank": 16, "train.grad_clip": 1.0})]
    manifest.record(arguments=["seed=1"], launcher={"name": "serial", "jobs": None}, jobs=first)
    assert manifest.jobs == first == read(manifest).jobs
    again = read(manifest)
    again.record(jobs=[job(2, tiny, seed=7)])
    last = read(manifest)
    assert last.jobs == again.jobs == [*first, job(2, tiny, seed=7)]
    assert last.arguments == ["seed=1"] and last.launcher == {"name": "serial", "jobs": None}
    assert '"changes": {"lora.rank": 16, "train.grad_clip": 1.0}' in (tmp_path / sweep_manifest.NAME).read_text()


def test_recording_nothing_new_writes_nothing(tmp_path, tiny):
    manifest = sweep_manifest.read_manifest(tmp_path)
    manifest.record(arguments=["a=1"], jobs=[job(0, tiny)])
    before = (tmp_path / sweep_manifest.NAME).read_bytes()
    read(manifest).record(arguments=["a=1"])
    assert (tmp_path / sweep_manifest.NAME).read_bytes() == before


def test_changes_apply_to_the_jobs_recorded_before_and_not_to_later_ones(tmp_path, tiny):
    manifest = sweep_manifest.read_manifest(tmp_path)
    manifest.record(jobs=[job(0, tiny, seed=1)])
    manifest.record(changes={"checkpoint.keep_last": 9, "loggers": {"csv": {}}}, jobs=[job(1, tiny, seed=2)])
    for found in (manifest, read(manifest)):
        first, second = found.jobs
        assert first.changes == {"checkpoint.keep_last": 9, "loggers": {"csv": {}}} and second.changes == {}
        assert first.config["checkpoint"]["keep_last"] == 9 and first.config["loggers"] == {"csv": {}}
        assert second == job(1, tiny, seed=2)


def test_changes_of_one_job_are_apart_from_its_config_and_end_with_later_ones_of_all_jobs(tmp_path, tiny):
    manifest = sweep_manifest.read_manifest(tmp_path)
    manifest.record(jobs=[job(0, tiny, seed=1), job(1, tiny, seed=2)])
    manifest.record(changes={"checkpoint.keep_last": 9})
    manifest.record(own_changes={1: {"checkpoint.keep_last": 5, "train.report_every": 2}})
    for found in (manifest, read(manifest)):
        assert [found.jobs[n].later_changes["checkpoint.keep_last"] for n in (0, 1)] == [9, 5]
        assert found.jobs[1].config["checkpoint"]["keep_last"] == 9
    manifest.record(changes={"checkpoint.keep_last": 7})
    for found in (manifest, read(manifest)):
        assert found.jobs[1].later_changes == {"checkpoint.keep_last": 7, "train.report_every": 2}


def test_a_manifest_torn_at_any_byte_reads_as_its_whole_records_and_can_be_extended(tmp_path, tiny):
    manifest = sweep_manifest.read_manifest(tmp_path)
    first, second = [job(0, tiny, seed=1), job(1, tiny, seed=2)], [job(2, tiny, seed=3), job(3, tiny, seed=4)]
    manifest.record(arguments=["seed=1,2"], jobs=first)
    size = manifest.size
    manifest.record(jobs=second)
    path = tmp_path / sweep_manifest.NAME
    whole = path.read_bytes()
    for end in [*range(0, len(whole), 97), size - 1, size, len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:end])
        torn = read(manifest)
        assert torn.jobs == ([*first, *second] if end == len(whole) else first if end >= size else [])
        torn.record(arguments=["seed=1,2"], jobs=[*first, *second][len(torn.jobs) :])
        assert read(manifest).jobs == [*first, *second]


def test_a_manifest_of_an_earlier_version_is_read_with_present_names_and_gets_its_configs(tmp_path, tiny):
    old = {"job": 0, "id": "of-old-names", "overrides": ["repeat=run", "lora.rank=4", "train.stop_at=3", "stored=run"]}
    same = {"job": 1, "id": "kept", "overrides": ["train.trunk.cache=false", "stored=run"]}
    lines = [{"schema": 1, "words": ["repeat=run", "lora.rank=4,8"], "time": "then"}, old, same]
    (tmp_path / sweep_manifest.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = sweep_manifest.read_manifest(tmp_path)
    assert manifest.arguments == ["repeat=run", "lora.rank=4,8"]
    first, second = manifest.jobs
    assert first.overrides == ("lora.rank=4", "stored=run") and first.config is None
    assert second.overrides == ("train.hidden_cache.enabled=false", "stored=run")
    manifest.record(jobs=[job(1, tiny, seed=2), job(0, tiny, seed=1)])
    assert read(manifest).jobs == manifest.jobs == [job(0, tiny, seed=1), job(1, tiny, seed=2)]


def test_trust_in_the_code_of_a_model_is_not_read_from_a_manifest(tmp_path, tiny):
    manifest = sweep_manifest.read_manifest(tmp_path)
    manifest.record(jobs=[job(0, tiny).with_changes({"model.trust_remote_code": True})])
    assert "trust_remote_code" not in read(manifest).jobs[0].config["model"]


JOB = {"job": 0, "id": "x", "overrides": []}


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "nothing",
        '{"schema": 9, "words": []}',
        '{"job": "a"}',
        "3",
        *(
            json.dumps({**JOB, **wrong})
            for wrong in (
                {"job": 5},
                {"overrides": ["hydra.run.dir=x"]},
                {"folder": "../x"},
                {"folder": "logs"},
                {"folder": ".hydra"},
                {"config": []},
                {"like": 0, "changes": {}},
                {"like": -1, "changes": {}},
                {"choices": {"model": 3}},
            )
        ),
        '{"set": {"seed": 1}, "job": 0}',
        '{"schema": 2, "lines": 1, "arguments": [], "launcher": {"name": "a b"}}',
        '{"schema": 2, "lines": 1, "arguments": [], "launcher": {"name": "process", "jobs": 0}}',
    ],
)
def test_a_file_that_is_no_manifest_is_refused_with_its_line(tmp_path, line):
    (tmp_path / sweep_manifest.NAME).write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=r"sweep.jsonl, line 1"):
        sweep_manifest.read_manifest(tmp_path)


def test_changes_of_one_job_that_do_not_fit_its_config_are_refused(tmp_path, tiny):
    manifest = sweep_manifest.read_manifest(tmp_path)
    manifest.record(jobs=[job(0, tiny)])
    with (tmp_path / sweep_manifest.NAME).open("a") as file:
        file.write('{"set": {"seed.x": 1}, "job": 0}\n')
    with pytest.raises(ConfigError, match=r"sweep.jsonl, line 3"):
        read(manifest)


@pytest.mark.parametrize("name", ["3", "r16", "lora.rank=4,seed=0", "a" * 120])
def test_a_plain_name_can_be_that_of_a_folder(name):
    assert sweep_manifest.is_valid_folder(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".x", "-x", "a" * 121, "logs", "a\n", "a b"])
def test_other_names_cannot(name):
    assert not sweep_manifest.is_valid_folder(name)
