"""Commit, load and rotate: what holds while nothing crashes, and against damage and hostile files.

Crashes, power cuts and failing disks are in test_store_faults.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoints.store import CheckpointStore
from runner.common.errors import CheckpointError, StorageError
from runner.common.filesystem import FileSystem

FILES = {
    "adapters.safetensors": random.Random(1).randbytes(3000),
    "adapter_config.json": b'{"rank": 8}',
    "optimizer.safetensors": random.Random(2).randbytes(1000),
    "train_state.json": b'{"step": 100}',
}
YEAR = 365 * 24 * 3600.0


def _files(mark: str) -> dict[str, bytes]:
    return FILES | {"train_state.json": mark.encode()}


def _mark(loaded: Any) -> str | None:
    return loaded and loaded.files["train_state.json"].decode()


def test_what_is_committed_is_loaded_with_its_reasons_and_metrics(store: CheckpointStore) -> None:
    made = store.commit(100, FILES, save_reasons=["every 100 updates", "best"], metrics={"valid_loss": 1.25})
    assert made.path == store.folder / "step-0000100"
    loaded = store.load(made.path)
    assert store.load_step(made.step) == loaded
    assert loaded.files == FILES
    assert loaded.checkpoint == made == store.checkpoints()[0]
    assert (made.step, made.manifest.save_reasons, made.manifest.metrics, made.manifest.run_id) == (
        100,
        ("every 100 updates", "best"),
        {"valid_loss": 1.25},
        "run-1",
    )
    assert sorted(os.listdir(store.folder)) == ["step-0000100"]
    assert sorted(os.listdir(made.path)) == sorted([*FILES, "manifest.json"])


def test_the_manifest_is_plain_json_that_names_size_and_hash_of_each_file(store: CheckpointStore) -> None:
    made = store.commit(100, FILES)
    record = json.loads((made.path / "manifest.json").read_bytes())
    assert (record["schema"], record["run_id"], record["step"]) == (1, "run-1", 100)
    assert record["files"] == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in FILES.items()
    }


def test_the_manifest_is_written_last_and_everything_is_synced_in_order(store: CheckpointStore, tape) -> None:
    store.commit(1, FILES)
    with tape() as calls:
        store.commit(2, {"a": b"1", "b": b"2"})
    told = [(kind, Path(path).name) for kind, path, *_ in calls.events if kind != "write"]
    temporary = told[0][1]
    assert temporary.startswith(".tmp-step-0000002-")
    assert told == [
        ("mkdir", temporary),
        *[(kind, name) for name in ("a", "b", "manifest.json") for kind in ("create", "sync")],
        ("sync", temporary),
        ("rename", temporary),
        ("sync", "checkpoints"),
    ]


def test_a_metric_that_is_not_finite_stays_not_finite(store: CheckpointStore) -> None:
    store.commit(1, FILES, metrics={"nan": math.nan, "inf": math.inf, "fine": 2})
    found = store.checkpoints()[0].manifest.metrics
    assert math.isnan(found["nan"])
    assert math.isnan(found["inf"])
    assert found["fine"] == 2.0


def test_no_checkpoint_and_no_valid_checkpoint_are_distinguished(store: CheckpointStore) -> None:
    assert store.newest_valid() == (None, [])
    assert store.checkpoints() == []
    assert store.repair() == []
    assert store.rotate({1}) == []
    made = store.commit(1, FILES)
    (made.path / "manifest.json").unlink()
    loaded, problems = store.newest_valid()
    assert loaded is None
    assert len(problems) == 1
    assert str(made.path) in problems[0]


def test_committing_a_step_again_replaces_it(store: CheckpointStore) -> None:
    store.commit(100, _files("old"))
    store.commit(100, _files("new") | {"more.json": b"{}"})
    loaded, problems = store.newest_valid()
    assert (_mark(loaded), problems) == ("new", [])
    assert os.listdir(store.folder) == ["step-0000100"]


def test_the_newest_is_the_highest_step_whatever_the_clock_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 2e9
    monkeypatch.setattr("runner.checkpoints.store.time.time", lambda: now)
    store = CheckpointStore(folder / "checkpoints", "run-1")
    for step, jump in ((100, 0), (300, -YEAR), (200, YEAR)):
        now += jump
        store.commit(step, _files(str(step)))
        os.utime(store.folder / f"step-{step:07d}", (now - 2 * step * YEAR / 100, now))
    assert _mark(store.newest_valid()[0]) == "300"
    assert [found.step for found in store.checkpoints()] == [100, 200, 300]
    assert store.rotate(set()) == [100, 200]


def test_steps_of_more_than_seven_digits_sort_as_numbers(store: CheckpointStore) -> None:
    for step in (9_999_999, 10_000_000, 123_456_789):
        store.commit(step, _files(str(step)))
    assert [found.step for found in store.checkpoints()] == [9_999_999, 10_000_000, 123_456_789]
    assert _mark(store.newest_valid()[0]) == "123456789"


@pytest.mark.parametrize(
    ("step", "files", "message"),
    [
        (-1, FILES, "step"),
        (10**18, FILES, "step"),
        (True, FILES, "step"),
        (1, {}, "no files"),
        (1, {"../a": b""}, "not allowed"),
        (1, {"/a": b""}, "not allowed"),
        (1, {"..": b""}, "not allowed"),
        (1, {"": b""}, "not allowed"),
        (1, {"a\n": b""}, "not allowed"),
        (1, {"a\0": b""}, "not allowed"),
        (1, {".hidden": b""}, "not allowed"),
        (1, {"manifest.json": b""}, "not allowed"),
        (1, {"Manifest.JSON": b""}, "not allowed"),
        (1, {"a": b"", "A": b""}, "differ only in case"),
        (1, {f"file{number}": b"" for number in range(9000)}, "more than 100 files"),
    ],
)
def test_what_a_manifest_cannot_hold_is_refused_before_anything_is_written(
    store: CheckpointStore, step: int, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        store.commit(step, files)
    assert not store.folder.exists()


def test_a_lack_of_space_is_found_before_anything_is_written(folder: Path) -> None:
    class Small(FileSystem):
        def free_space(self, folder: Path) -> int:
            return 20_000

    store = CheckpointStore(folder / "checkpoints", "run-1", Small())
    store.commit(1, {"a": bytes(1000)})
    with pytest.raises(StorageError, match=r"step 2 was not saved.*/checkpoints: needs 24\.6 kB, has 20\.0 kB\. Make"):
        store.commit(2, {"a": bytes(10_000), "b": b"1"})
    assert os.listdir(store.folder) == ["step-0000001"]


def test_each_bad_checkpoint_is_named_and_the_newest_good_one_is_loaded(store: CheckpointStore) -> None:
    for step in (100, 200, 300, 400):
        store.commit(step, _files(str(step)))
    (store.folder / "step-0000400" / "manifest.json").write_bytes(b"{}")
    (store.folder / "step-0000300" / "optimizer.safetensors").unlink()
    loaded, problems = store.newest_valid()
    assert _mark(loaded) == "200"
    assert ["0000400" in problems[0], "0000300" in problems[1], len(problems)] == [True, True, 2]
    assert "optimizer.safetensors: missing" in problems[1]


def test_the_callers_check_can_refuse_a_checkpoint(store: CheckpointStore) -> None:
    for step in (100, 200):
        store.commit(step, _files(str(step)))

    def check(loaded: Any) -> None:
        if _mark(loaded) == "200":
            raise CheckpointError("lora_a is not finite")

    loaded, problems = store.newest_valid(check)
    assert _mark(loaded) == "100"
    assert problems == [f"{store.folder}/step-0000200: lora_a is not finite"]


def test_checkpoints_of_another_run_are_named_not_used_and_not_removed(store: CheckpointStore) -> None:
    CheckpointStore(store.folder, "run-0").commit(900, _files("stale"))
    assert store.newest_valid()[0] is None
    for step in (100, 200):
        store.commit(step, _files(str(step)))
    loaded, problems = store.newest_valid()
    assert _mark(loaded) == "200"
    assert problems == [f"{store.folder}/step-0000900: left by another run (run-0; this one is run-1)"]
    assert store.rotate({900}) == [100]
    assert [(found.step, found.manifest.run_id) for found in store.checkpoints()] == [(200, "run-1"), (900, "run-0")]


def test_a_linked_checkpoint_is_not_loaded_not_listed_and_not_removed(store: CheckpointStore, folder: Path) -> None:
    outside = CheckpointStore(folder / "elsewhere", "run-1").commit(900, _files("outside")).path
    for step in (100, 200):
        store.commit(step, _files(str(step)))
    (store.folder / "step-0000900").symlink_to(outside)
    loaded, problems = store.newest_valid()
    assert _mark(loaded) == "200"
    assert "step-0000900: a symbolic link" in problems[0]
    assert [found.step for found in store.checkpoints()] == [100, 200]
    assert store.rotate(set()) == [100]
    assert (store.folder / "step-0000900").is_symlink()
    with pytest.raises(StorageError, match="step-0000900: a symbolic link is in the way"):
        store.commit(900, _files("new"))
    assert _mark(store.load(outside)) == "outside"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_store_whose_folder_is_not_a_folder_is_refused(folder: Path, kind: str) -> None:
    CheckpointStore(folder / "real", "run-1").commit(100, FILES)
    if kind == "link":
        (folder / "checkpoints").symlink_to(folder / "real")
    else:
        (folder / "checkpoints").write_bytes(b"")
    store = CheckpointStore(folder / "checkpoints", "run-1")
    for use in (
        lambda: store.commit(200, FILES),
        lambda: store.rotate(set()),
        store.repair,
        store.newest_valid,
        store.checkpoints,
    ):
        with pytest.raises(StorageError, match=r"/checkpoints: a .*but checkpoints need a folder"):
            use()
    assert os.listdir(folder / "real") == ["step-0000100"]


def test_a_run_that_is_reached_through_a_link_is_fine(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "run").symlink_to(folder / "real")
    store = CheckpointStore(folder / "run" / "checkpoints", "run-1")
    store.commit(100, FILES)
    assert store.newest_valid()[0].files == FILES


def test_leftovers_that_are_links_are_removed_themselves(store: CheckpointStore, folder: Path) -> None:
    victim = folder / "victim"
    victim.mkdir()
    (victim / "file").write_bytes(b"mine")
    store.commit(100, FILES)
    for name in (".tmp-step-0000100-00000000", ".del-x"):
        (store.folder / name).symlink_to(victim)
    (store.folder / ".old-step-0000200-00000000").symlink_to(victim)
    os.mkfifo(store.folder / ".tmp-fifo")
    assert len(store.repair()) == 3
    assert (victim / "file").read_bytes() == b"mine"
    assert sorted(os.listdir(store.folder)) == [".old-step-0000200-00000000", "step-0000100"]


def test_names_that_only_resemble_those_of_checkpoints_are_ignored(store: CheckpointStore) -> None:
    store.commit(100, FILES)
    others = [
        "step-1",
        "step-00000100",
        "step-0000100-copy",
        "step-٠٠٠٠١٠٠",
        "notes",
        ".old-mine",
        "step--000001",
    ]
    for name in others:
        (store.folder / name).mkdir()
    store.repair()
    store.rotate(set())
    assert sorted(os.listdir(store.folder)) == sorted([*others, "step-0000100"])
    assert store.newest_valid()[1] == []


def test_rotation_removes_all_but_those_to_keep(store: CheckpointStore) -> None:
    for step in (100, 200, 300, 400):
        store.commit(step, _files(str(step)))
    assert store.rotate({200, 400, 999}) == [100, 300]
    assert sorted(os.listdir(store.folder)) == ["step-0000200", "step-0000400"]


@pytest.mark.parametrize("damage", ["manifest.json", "adapters.safetensors"])
def test_the_newest_valid_checkpoint_stays_whatever_the_caller_says(store: CheckpointStore, damage: str) -> None:
    for step in (100, 200, 300):
        store.commit(step, _files(str(step)))
    file = store.folder / "step-0000300" / damage
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    store.rotate({300})
    assert _mark(store.newest_valid()[0]) == "200"
    assert (store.folder / "step-0000300").exists()
    assert not (store.folder / "step-0000100").exists()


def test_rotation_removes_nothing_if_no_checkpoint_is_valid(store: CheckpointStore) -> None:
    for step in (100, 200):
        (store.commit(step, FILES).path / "adapters.safetensors").write_bytes(b"")
    assert store.rotate(set()) == []
    assert len(store.checkpoints()) == 2
