"""A Hub data set is read from the Hub's cache without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"

PROGRAM = """
import sys
from runner.data.source import find_dataset, find_split_files
from runner.common.errors import DataError
try:
    folder = find_dataset(sys.argv[1])
    for split, (file,) in find_split_files(folder).items():
        print(split, file.name, file.read_text().strip())
except DataError as error:
    print("DataError:", error)
"""


@pytest.fixture
def write_hub_cache(tmp_path):
    """Write files into a cache with the Hub's layout: blobs, a snapshot of links to them, a ref."""

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
def find_offline(tmp_path):
    """Locate a data set in another process, because the Hub library reads the environment when it is imported."""

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


def test_a_cached_data_set_is_used_offline(write_hub_cache, find_offline):
    write_hub_cache("some-org/some.data", {"train.jsonl": ROW, "validation.jsonl": ROW, "README.md": "x"})
    assert find_offline("some-org/some.data").splitlines() == [
        f"train train.jsonl {ROW}",
        f"valid validation.jsonl {ROW}",
    ]


def test_files_in_the_data_folder_are_found(write_hub_cache, find_offline):
    write_hub_cache("org/name", {"data/train.jsonl": ROW, "dataset_infos.json": "{}"})
    assert find_offline("org/name").splitlines() == [f"train train.jsonl {ROW}"]


def test_a_data_set_without_jsonl_files_is_refused_with_its_content(write_hub_cache, find_offline):
    write_hub_cache("org/name", {"infos.json": "{}"})
    answer = find_offline("org/name")
    assert answer.startswith("DataError:")
    assert "It contains: infos.json" in answer


def test_a_data_set_that_is_not_cached_is_refused_with_a_remedy(find_offline):
    answer = find_offline("org/missing")
    assert answer.startswith("DataError: 'org/missing' is not a local folder")
    assert "HF_HUB_OFFLINE" in answer


def test_an_invalid_hub_name_is_refused(find_offline):
    assert find_offline("org/bad..name").startswith("DataError: 'org/bad..name'")


def test_a_local_folder_does_not_import_the_hub_library(tmp_path, find_offline):
    (tmp_path / "huggingface_hub.py").write_text("raise SystemExit('imported')")
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "train.jsonl").write_text(ROW)
    assert find_offline("org/name").splitlines() == [f"train train.jsonl {ROW}"]


LIBRARY_PROGRAM = """
import sys
from runner.config.schema import DataConfig, SplitsConfig
from runner.data.readers import read_rows
from runner.data.source import find_sources
from runner.common.errors import DataError
path, config, train, valid = sys.argv[1:]
data = DataConfig(path=path, config=config or None, splits=SplitsConfig(train=train or None, valid=valid or None))
try:
    for split, files in find_sources(data)[0].find_files().items():
        print(split, [row.value["prompt"] for file in files for row in read_rows(file)])
except DataError as error:
    print("DataError:", error)
"""


@pytest.fixture
def parquet_snapshot(tmp_path):
    """A cached Hub data set of Parquet shards with two configurations."""
    import pyarrow
    import pyarrow.parquet

    root = tmp_path / "hub" / "datasets--org--name"
    snapshot = root / "snapshots" / COMMIT
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for config in ("easy", "hard"):
        (snapshot / config).mkdir(parents=True)
        for shard in (0, 1):
            rows = [{"prompt": f"{config} {shard} {n}", "completion": "x"} for n in range(5)]
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, snapshot / config / f"train-0000{shard}-of-00002.parquet")
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("easy", "hard")
    )
    (snapshot / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


@pytest.fixture
def find_with_library(tmp_path):
    """As `find_offline`, with a configuration and splits."""

    def run(*arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", LIBRARY_PROGRAM, *arguments],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "HF_HUB_CACHE": str(tmp_path / "hub"),
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
                "RUNNER_CACHE": str(tmp_path / "cache"),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_cached_parquet_data_set_is_read_offline_with_its_configuration_and_slices(
    parquet_snapshot, find_with_library
):
    rows = [f"easy {shard} {n}" for shard in (0, 1) for n in range(5)]
    assert find_with_library("org/name", "easy", "", "") == f"train {rows}\n"
    sliced = find_with_library("org/name", "easy", "train[:80%]", "train[80%:]")
    assert sliced == f"train {rows[:8]}\nvalid {rows[8:]}\n"


def test_an_unknown_configuration_is_refused_with_the_known_ones(parquet_snapshot, find_with_library):
    answer = find_with_library("org/name", "gone", "", "")
    assert answer.startswith("DataError: data.path=org/name cannot be loaded from the hub: ")
    assert "easy" in answer


def test_without_the_library_the_message_says_what_to_install(parquet_snapshot, find_with_library, tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'datasets' else find(name, *rest)\n"
    )
    path = os.pathsep.join([str(tmp_path / "without"), *filter(None, sys.path)])
    answer = find_with_library("org/name", "easy", "", "", PYTHONPATH=path)
    assert "pip install 'mlx-runner[hub]'" in answer
