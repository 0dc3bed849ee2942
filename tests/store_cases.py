"""What can be cut off in a store of checkpoints, and what must hold after it. Loaded by path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from runner.checkpoints.store import CheckpointStore


def files(mark: str) -> dict[str, bytes]:
    return {"adapters.safetensors": f"weights of {mark}".encode() * 20, "train_state.json": mark.encode()}


def first(store: CheckpointStore) -> None:
    store.commit(100, files("new"))


def further(store: CheckpointStore) -> None:
    store.commit(200, files("new"))


def replace(store: CheckpointStore) -> None:
    store.commit(100, files("new"))


def rotate(store: CheckpointStore) -> None:
    store.rotate({100, 300})


def commit_and_rotate(store: CheckpointStore) -> None:
    store.commit(400, files("new"))
    store.rotate({300, 400})


# What is there before, what happens, what may be loaded if it is cut off, what must be loaded if it is not.
CASES: dict[str, tuple[list[int], Callable[[CheckpointStore], None], set[str | None], str]] = {
    "the first save": ([], first, {None, "new"}, "new"),
    "a further save": ([100], further, {"old 100", "new"}, "new"),
    "a save in place of one": ([100], replace, {"old 100", "new"}, "new"),
    "a save in place of the newest of two": ([50, 100], replace, {"old 100", "new"}, "new"),
    "a rotation": ([100, 200, 300], rotate, {"old 300"}, "old 300"),
    "a save and a rotation": ([100, 200, 300], commit_and_rotate, {"old 300", "new"}, "new"),
}
# Besides the newest, rotation must leave these alone at every moment.
KEPT = {"a rotation": 100, "a save and a rotation": 300}


def prepare(folder: Path, steps: list[int]) -> CheckpointStore:
    folder.mkdir(parents=True)
    store = CheckpointStore(folder / "checkpoints", "run-1")
    store.folder.mkdir()
    for step in steps:
        store.commit(step, files(f"old {step}"))
    return store


def check(store: CheckpointStore, case: str, *, completed: bool) -> None:
    """The promise: after a repair the old or the new one loads, whole, and nothing is left over."""
    _, _, may, must = CASES[case]
    store.repair()
    loaded, wrong = store.newest_valid()
    mark = loaded and loaded.files["train_state.json"].decode()
    assert mark in ({must} if completed else may)
    assert wrong == []
    assert mark is None or loaded.files == files(mark)
    if case in KEPT:
        kept = store.load(store.folder / f"step-{KEPT[case]:07d}")
        assert kept.files == files(f"old {KEPT[case]}")
    assert [name for name in os.listdir(store.folder) if not name.startswith("step-")] == []
