"""A run's directory: claimed once, locked by the living only, its files whole or as they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from runner.common.atomic_io import write_atomically
from runner.common.errors import ConfigError, DirectoryInUse, StorageError
from runner.common.safe_yaml import load_yaml_file
from runner.runs.directory import RunDirectory
from runner.runs.rows import RowFile, read_rows


def test_a_directory_is_claimed_once(tmp_path):
    first = RunDirectory(tmp_path / "run")
    first.claim()
    with pytest.raises(DirectoryInUse):
        RunDirectory(tmp_path / "run").claim()
    first.write_config({})
    first.unlock()
    with pytest.raises(ConfigError, match="resume="):
        RunDirectory(tmp_path / "run").claim()


def test_a_directory_with_other_things_is_never_claimed(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        RunDirectory(tmp_path).claim()
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_fifty_processes_claim_one_directory_and_one_gets_it(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from runner.runs.directory import RunDirectory; from runner.common.errors import ConfigError, DirectoryInUse\n"
        "d = RunDirectory(Path(sys.argv[1]))\n"
        "sys.stdin.read()\n"
        "try: d.claim(); d.write_config({})\n"
        "except (ConfigError, DirectoryInUse): sys.exit(9)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    processes = [subprocess.Popen(words, stdin=subprocess.PIPE) for _ in range(50)]
    for process in processes:
        process.stdin.close()
    assert sorted(p.wait() for p in processes) == [0] + [9] * 49


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    code = (
        "import sys; from runner.runs.directory import RunDirectory; from pathlib import Path\n"
        "RunDirectory(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    directory = RunDirectory(tmp_path)
    with pytest.raises(DirectoryInUse, match=rf"pid {holder.pid} on .* since "):
        directory.lock()
    assert directory.held()
    holder.kill()
    holder.wait()
    assert not directory.held()
    directory.lock()
    directory.unlock()


def test_running_without_a_holder_reads_as_interrupted(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_status({"state": "running", "step": 3})
    assert directory.read_status()["state"] == "interrupted"
    directory.lock()
    assert RunDirectory(tmp_path).read_status()["state"] == "running"
    directory.unlock()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "odd"}', "\x00"])
def test_a_status_that_cannot_be_read_is_unknown_and_no_crash(tmp_path, text):
    directory = RunDirectory(tmp_path)
    directory.status.write_text(text)
    assert directory.read_status()["state"] in ("unknown", "interrupted")


def test_rows_are_cut_back_to_where_a_checkpoint_saw_them_and_a_torn_line_is_left_out(tmp_path):
    rows = RowFile(tmp_path / "m.jsonl")
    rows.append({"step": 1})
    seen = rows.offset
    rows.append({"step": 2})
    rows.close()
    with (tmp_path / "m.jsonl").open("ab") as out:
        out.write(b'{"step": 3, "lo')
    assert [r["step"] for r in read_rows(tmp_path / "m.jsonl")] == [1, 2]
    again = RowFile(tmp_path / "m.jsonl", seen)
    again.append({"step": 2, "again": True})
    again.close()
    assert [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2, "again": True},
    ]


def test_rows_shorter_than_the_checkpoint_saw_are_refused(tmp_path):
    with pytest.raises(StorageError, match="cut or replaced"):
        RowFile(tmp_path / "m.jsonl", 10)


def test_a_link_in_the_place_of_a_row_file_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "m.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError):
        RowFile(tmp_path / "m.jsonl")
    assert (tmp_path / "victim").read_text() == "precious"


def test_an_atomic_write_leaves_the_old_text_where_it_fails(tmp_path, monkeypatch):
    target = tmp_path / "f"
    write_atomically(target, "old")

    def refuse(*_):
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="No space"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x\n",
        "a: !!python/object/apply:os.system ['true']\n",
        "- 1\n",
        "a: [",
        "a: " + "[" * 5000,
        "x" * 2_000_000,
    ],
    ids=["alias", "object", "list", "broken", "deep", "large"],
)
def test_a_hostile_yaml_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="config.yaml"):
        load_yaml_file(tmp_path / "config.yaml", missing="")


def test_a_start_that_was_cut_off_before_its_config_leaves_the_directory_to_the_next(tmp_path):
    first = RunDirectory(tmp_path / "run")
    first.claim()
    (first.path / ".hydra").mkdir()
    first.unlock()
    RunDirectory(tmp_path / "run").claim()
