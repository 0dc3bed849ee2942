"""Numbers and folders follow the order of addition and never change; a torn last line is ignored."""

from __future__ import annotations

import json

import pytest

from runner.common.errors import ConfigError, DirectoryInUse
from runner.runs import sweep_manifest
from runner.runs.directory import RunDirectory


def test_numbers_follow_the_order_of_arrival_and_never_change(tmp_path):
    manifest = sweep_manifest.read_manifest(tmp_path)
    manifest.add(["a=1,2"], [("a=1",), ("a=2",)])
    again = sweep_manifest.read_manifest(tmp_path)
    again.add(["a=0,1,2"], [("a=0",), ("a=1",), ("a=2",)])
    last = sweep_manifest.read_manifest(tmp_path)
    assert {job.overrides: job.number for job in last.jobs.values()} == {("a=1",): 0, ("a=2",): 1, ("a=0",): 2}
    assert last.arguments == ["a=0,1,2"]


def test_adding_recorded_jobs_writes_nothing(tmp_path):
    manifest = sweep_manifest.read_manifest(tmp_path)
    manifest.add(["a=1"], [("a=1",)])
    before = (tmp_path / sweep_manifest.NAME).read_bytes()
    sweep_manifest.read_manifest(tmp_path).add(["a=1"], [("a=1",)])
    assert (tmp_path / sweep_manifest.NAME).read_bytes() == before


def test_a_manifest_torn_at_any_byte_reads_as_its_whole_lines_and_can_be_extended(tmp_path):
    manifest = sweep_manifest.read_manifest(tmp_path)
    manifest.add(["a=1,2"], [("a=1",), ("a=2",)])
    path = tmp_path / sweep_manifest.NAME
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        torn = sweep_manifest.read_manifest(tmp_path)
        assert [job.overrides for job in torn.jobs.values()] == [("a=1",), ("a=2",)][: len(torn.jobs)]
        torn.add(["a=1,2"], [("a=1",), ("a=2",)])
        numbers = {job.overrides: job.number for job in sweep_manifest.read_manifest(tmp_path).jobs.values()}
        assert numbers == {("a=1",): 0, ("a=2",): 1}


def test_overrides_of_an_earlier_version_are_read_with_present_names_and_without_those_of_one_invocation(tmp_path):
    old = {"job": 0, "id": "of-old-names", "overrides": ["repeat=run", "lora.rank=4", "train.stop_at=3", "stored=run"]}
    same = {"job": 1, "id": "kept", "overrides": ["lora.rank=8", "stored=run"]}
    lines = [{"schema": 1, "words": ["repeat=run", "lora.rank=4,8"], "time": "then"}, old, same]
    (tmp_path / sweep_manifest.NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = sweep_manifest.read_manifest(tmp_path)
    assert manifest.arguments == ["repeat=run", "lora.rank=4,8"]
    first, second = manifest.jobs.values()
    assert first.overrides == ("lora.rank=4", "stored=run")
    assert first.identity == sweep_manifest.job_id(first.overrides)
    assert second.overrides == ("lora.rank=8", "stored=run") and second.identity == "kept"


@pytest.mark.parametrize(
    "line",
    ["[]", "nothing", '{"job": 5, "id": "x", "overrides": []}', '{"schema": 9, "words": []}', '{"job": "a"}', "3"],
)
def test_a_file_that_is_no_manifest_is_refused_with_its_line(tmp_path, line):
    (tmp_path / sweep_manifest.NAME).write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=r"sweep.jsonl, line 1"):
        sweep_manifest.read_manifest(tmp_path)


def test_what_a_start_left_that_is_abandoned_before_its_first_job_is_nobodys(tmp_path):
    folder = tmp_path / "sweep"
    assert not sweep_manifest.is_abandoned(folder)
    folder.mkdir()
    assert sweep_manifest.is_abandoned(folder)
    directory = RunDirectory(folder)
    directory.lock()
    with pytest.raises(DirectoryInUse):
        sweep_manifest.is_abandoned(folder)
    directory.unlock()
    assert sweep_manifest.is_abandoned(folder)
    (folder / "multirun.yaml").write_text("torn: [")
    sweep_manifest.read_manifest(folder).add(["a=1"], [])
    assert sweep_manifest.is_abandoned(folder)
    manifest = sweep_manifest.read_manifest(folder)
    manifest.add(["a=1"], [("a=1",)])
    assert not sweep_manifest.is_abandoned(folder)
    (folder / sweep_manifest.NAME).unlink()
    (folder / "notes.txt").write_text("mine")
    assert not sweep_manifest.is_abandoned(folder)
    (folder / "notes.txt").unlink()
    (tmp_path / "link").symlink_to(folder)
    assert not sweep_manifest.is_abandoned(tmp_path / "link")
