"""A run's directory: claimed once, locked by the living only, its files whole or as they were."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runner.common.errors import ConfigError, DirectoryInUse
from runner.common.safe_yaml import load_yaml_file
from runner.runs.directory import RunDirectory


def test_a_directory_is_claimed_once(tmp_path):
    first = RunDirectory(tmp_path / "run")
    first.claim()
    with pytest.raises(DirectoryInUse):
        RunDirectory(tmp_path / "run").claim()
    first.write_config({})
    first.unlock()
    with pytest.raises(ConfigError, match="resume="):
        RunDirectory(tmp_path / "run").claim()


def test_a_directory_that_holds_other_files_is_not_claimed(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        RunDirectory(tmp_path).claim()
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_directory_that_holds_only_desktop_files_is_claimed(tmp_path):
    for name in (".DS_Store", "._run.log", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\0")
    RunDirectory(tmp_path).claim()
    assert (tmp_path / "checkpoints").is_dir()


def test_of_fifty_processes_that_claim_a_directory_one_succeeds(tmp_path):
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


def test_the_lock_names_its_holder_and_is_released_when_it_dies(tmp_path):
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
    assert directory.is_locked()
    holder.kill()
    holder.wait()
    assert not directory.is_locked()
    directory.lock()
    directory.unlock()


def test_the_state_running_without_a_lock_reads_as_interrupted(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_status({"state": "running", "step": 3})
    assert directory.read_status()["state"] == "interrupted"
    directory.lock()
    assert RunDirectory(tmp_path).read_status()["state"] == "running"
    directory.unlock()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "odd"}', "\x00"])
def test_a_status_that_cannot_be_read_has_the_state_unknown(tmp_path, text):
    directory = RunDirectory(tmp_path)
    directory.status.write_text(text)
    assert directory.read_status()["state"] in ("unknown", "interrupted")


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
def test_a_hostile_config_is_refused_with_its_path(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="config.yaml"):
        load_yaml_file(tmp_path / "config.yaml", missing="")


def test_a_directory_left_by_a_start_that_was_killed_before_its_config_is_claimed(tmp_path):
    first = RunDirectory(tmp_path / "run")
    first.claim()
    (first.path / ".hydra").mkdir()
    first.write_status({"parent": "that of a branch"})
    first.unlock()
    second = RunDirectory(tmp_path / "run")
    second.claim()
    assert not second.status.exists()  # what begins here now is another run
