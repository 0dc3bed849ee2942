"""Kills, power cuts and failing disks inside commit, replace, rotate and repair."""

from __future__ import annotations

import errno
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from store_cases import CASES, check, files, prepare

from runner.checkpoints.store import CheckpointStore
from runner.common.errors import StorageError
from runner.common.filesystem import FileSystem


@pytest.mark.parametrize("case", CASES)
def test_after_a_kill_at_any_system_call_the_old_or_the_new_checkpoint_loads(
    tmp_path: Path, tape, killed, case: str
) -> None:
    steps, act, _, _ = CASES[case]
    for at in range(1000):
        store = prepare(tmp_path / f"{at}", steps)
        with tape(stop_at=at, piece=150) as calls, suppress(killed):
            act(store)
        check(CheckpointStore(store.folder, "run-1"), case, completed=not calls.was_hit)
        if not calls.was_hit:
            break
    assert at > 5


@pytest.mark.parametrize("case", CASES)
def test_after_a_kill_at_any_file_system_operation_the_old_or_the_new_checkpoint_loads(
    tmp_path: Path, killed, case: str
) -> None:
    steps, act, _, _ = CASES[case]
    for at in range(1000):
        store = prepare(tmp_path / f"{at}", steps)
        mortal = _MortalDisk(at, killed)
        try:
            act(CheckpointStore(store.folder, "run-1", mortal))
            completed = True
        except killed:
            completed = False
        check(CheckpointStore(store.folder, "run-1"), case, completed=completed)
        if completed:
            break
    assert at > 5


class _MortalDisk(FileSystem):
    """Lives for `calls` calls, of any operation."""

    def __init__(self, calls: int, end: type[BaseException]) -> None:
        self.left, self.end = calls, end

    def __getattribute__(self, name: str) -> object:
        found = object.__getattribute__(self, name)
        if name in ("left", "end") or not callable(found):
            return found
        self.left -= 1
        if self.left < 0:
            raise self.end
        return found


@pytest.mark.parametrize("case", ["a save in place of one", "a save and a rotation"])
def test_a_killed_repair_is_completed_by_the_next(tmp_path: Path, tape, killed, case: str) -> None:
    steps, act, _, _ = CASES[case]
    store = prepare(tmp_path / "whole", steps)
    with tape() as calls:
        act(store)
    repairs = 0
    for first in range(len(calls.calls)):
        store = prepare(tmp_path / f"{first}", steps)
        with tape(stop_at=first), pytest.raises(killed):
            act(store)
        for second in range(100):
            again = tmp_path / f"{first}-{second}"
            shutil.copytree(store.folder.parent, again)
            with tape(stop_at=second) as calls, suppress(killed):
                CheckpointStore(again / "checkpoints", "run-1").repair()
            check(CheckpointStore(again / "checkpoints", "run-1"), case, completed=False)
            repairs += calls.was_hit
            if not calls.was_hit:
                break
    assert repairs > 30


@pytest.mark.parametrize("case", CASES)
def test_after_a_power_cut_at_any_moment_the_old_or_the_new_checkpoint_loads(
    tmp_path: Path, tape, power_cut, case: str
) -> None:
    steps, act, _, _ = CASES[case]
    store = prepare(tmp_path / "before", steps)
    disk = power_cut(store.folder.parent)
    with tape(piece=150) as calls:
        act(store)
    rng = random.Random(case)
    for moment in range(len(calls.events) + 1):
        for attempt in range(5):
            after = tmp_path / f"{moment}-{attempt}"
            disk.leave(after, rng if attempt else None)
            completed = moment == len(calls.events)
            check(CheckpointStore(after / "checkpoints", "run-1"), case, completed=completed)
        if not completed:
            disk.apply(calls.events[moment])


def test_after_a_kill_and_a_power_cut_inside_the_repair_a_checkpoint_loads(
    tmp_path: Path, tape, killed, power_cut
) -> None:
    """What a killed process renamed is not on the disk yet when the next one begins to repair."""
    case, rng, cuts = "a save in place of one", random.Random(0), 0
    steps, act, _, _ = CASES[case]
    for at in range(1000):
        store = prepare(tmp_path / f"{at}", steps)
        disk = power_cut(store.folder.parent)
        with tape(stop_at=at) as calls, suppress(killed):
            act(store)
        if not calls.was_hit:
            break
        for event in calls.events:
            disk.apply(event)
        with tape() as repair:
            CheckpointStore(store.folder, "run-1").repair()
        for moment in range(len(repair.events) + 1):
            for attempt in range(3):
                after = tmp_path / f"{at}-{moment}-{attempt}"
                disk.leave(after, rng if attempt else None)
                check(CheckpointStore(after / "checkpoints", "run-1"), case, completed=False)
                cuts += 1
            if moment < len(repair.events):
                disk.apply(repair.events[moment])
    assert cuts > 100


@pytest.mark.parametrize(
    ("error", "for_good"), [(errno.EIO, False), (errno.ENOSPC, True)], ids=["EIO once", "ENOSPC for good"]
)
@pytest.mark.parametrize("case", CASES)
def test_a_failing_call_is_a_storage_error_and_loses_no_checkpoint(
    tmp_path: Path, tape, case: str, error: int, for_good: bool
) -> None:
    steps, act, _, _ = CASES[case]
    for at in range(1000):
        store = prepare(tmp_path / f"{at}", steps)
        completed = True
        with tape(fail_at=at, error=error, for_good=for_good) as calls:
            try:
                act(store)
            except StorageError as failure:
                completed = False
                assert errno.errorcode[error] in str(failure)
                assert str(store.folder) in str(failure)
        check(CheckpointStore(store.folder, "run-1"), case, completed=completed)
        store.commit(500, files("later"))
        assert store.newest_valid()[0].files == files("later")
        if not calls.was_hit:
            break
    assert at > 5


def test_a_failed_save_frees_its_space(tmp_path: Path, tape) -> None:
    store = prepare(tmp_path / "run", [100])
    with (
        tape(fail_at=4, error=errno.ENOSPC),
        pytest.raises(StorageError, match=r"step 200 was not saved.*ENOSPC"),
    ):
        store.commit(200, files("new"))
    assert os.listdir(store.folder) == ["step-0000100"]


def test_a_replacement_that_fails_at_its_rename_is_undone_at_once(tmp_path: Path) -> None:
    class Full(FileSystem):
        def rename(self, source: Path, target: Path) -> None:
            if source.name.startswith(".tmp-"):
                raise StorageError("no room for a name")
            super().rename(source, target)

    store = prepare(tmp_path / "run", [100])
    with pytest.raises(StorageError, match="no room for a name"):
        CheckpointStore(store.folder, "run-1", Full()).commit(100, files("new"))
    loaded, problems = store.newest_valid()
    assert (loaded.files, problems) == (files("old 100"), [])
    assert os.listdir(store.folder) == ["step-0000100"]


def test_leftovers_of_a_failing_disk_are_removed_by_the_next_save(tmp_path: Path, tape) -> None:
    store = prepare(tmp_path / "run", [100])
    with tape(fail_at=4, error=errno.EIO, for_good=True), pytest.raises(StorageError):
        store.commit(200, files("new"))
    assert len(os.listdir(store.folder)) == 2
    store.commit(300, files("new"))
    assert sorted(os.listdir(store.folder)) == ["step-0000100", "step-0000300"]


def test_repair_reports_what_it_did_and_does_nothing_the_second_time(tmp_path: Path) -> None:
    store = prepare(tmp_path / "run", [100, 200])
    (store.folder / "step-0000200").rename(store.folder / ".old-step-0000200-0123abcd")
    (store.folder / ".tmp-step-0000300-0123abcd").mkdir()
    (store.folder / ".del-step-0000050-0123abcd").mkdir()
    loaded, problems = store.newest_valid()
    assert loaded.checkpoint.step == 100
    assert problems == [f"{store.folder}/.old-step-0000200-0123abcd: moved aside by a replacement that was interrupted"]
    message = store.repair()
    assert len(message) == 3
    assert "step-0000200: put back from .old-step-0000200-0123abcd" in message[0]
    assert store.repair() == []
    assert store.newest_valid()[0].checkpoint.step == 200


def test_a_damaged_replacement_is_replaced_by_the_checkpoint_that_it_replaced(tmp_path: Path) -> None:
    store = prepare(tmp_path / "run", [100])
    shutil.copytree(store.folder / "step-0000100", store.folder / ".old-step-0000100-0123abcd")
    (store.folder / "step-0000100" / "train_state.json").write_bytes(b"old 1OO")
    assert len(store.repair()) == 1
    assert store.newest_valid()[0].files == files("old 100")
    assert os.listdir(store.folder) == ["step-0000100"]
