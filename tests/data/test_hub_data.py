"""A hub id is read from the hub's cache without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"

PROGRAM = """
import sys
from runner.data.source import find_files, resolve
from runner.common.errors import DataError
try:
    folder = resolve(sys.argv[1])
    for split, file in find_files(folder).items():
        print(split, file.name, file.read_text().strip())
except DataError as error:
    print("DataError:", error)
"""


@pytest.fixture
def cache(tmp_path):
    """Writes files into a cache of the hub's layout: blobs, a snapshot of links to them, a ref."""

    def write(name: str, files: dict[str, str]):
        root = tmp_path / "hub" / ("datasets--" + name.replace("/", "--"))
        snapshot = root / "snapshots" / COMMIT
        (root / "blobs").mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(COMMIT)
        for number, (file, content) in enumerate(files.items()):
            blob = root / "blobs" / f"{number:040x}"
            blob.write_text(content)
            link = snapshot / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))

    return write


@pytest.fixture
def resolve_offline(tmp_path):
    """Runs in a process of its own: the hub's library reads the environment when it is imported."""

    def run(path: str) -> str:
        environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
        paths = os.pathsep.join(filter(None, sys.path))
        environment["PYTHONPATH"] = paths
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, path],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


ROW = json.dumps({"text": "a"})


def test_a_cached_data_set_is_used_offline(cache, resolve_offline):
    cache("some-org/some.data", {"train.jsonl": ROW, "validation.jsonl": ROW, "README.md": "x"})
    assert resolve_offline("some-org/some.data").splitlines() == [
        f"train train.jsonl {ROW}",
        f"valid validation.jsonl {ROW}",
    ]


def test_files_in_the_data_folder_are_found(cache, resolve_offline):
    cache("org/name", {"data/train.jsonl": ROW, "dataset_infos.json": "{}"})
    assert resolve_offline("org/name").splitlines() == [f"train train.jsonl {ROW}"]


def test_a_data_set_without_json_lines_lists_what_is_there(cache, resolve_offline):
    cache("org/name", {"infos.json": "{}"})
    answer = resolve_offline("org/name")
    assert answer.startswith("DataError:")
    assert "It holds: infos.json" in answer


def test_what_is_not_in_the_cache_says_how_to_get_it(resolve_offline):
    answer = resolve_offline("org/missing")
    assert answer.startswith("DataError: 'org/missing' is no folder here")
    assert "HF_HUB_OFFLINE" in answer


def test_a_name_that_the_hub_cannot_have_is_refused(resolve_offline):
    assert resolve_offline("org/bad..name").startswith("DataError: 'org/bad..name'")


def test_a_local_folder_needs_no_hub_library(tmp_path, resolve_offline):
    (tmp_path / "huggingface_hub.py").write_text("raise SystemExit('imported')")
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "train.jsonl").write_text(ROW)
    assert resolve_offline("org/name").splitlines() == [f"train train.jsonl {ROW}"]
