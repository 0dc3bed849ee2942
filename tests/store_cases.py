"""Actions of a checkpoint store that a kill or a power cut interrupts, and what required hold afterwards."""

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


# Steps saved before; the action; the marks that may load if it is interrupted; the mark that has to load if it is not.
CASES: dict[str, tuple[list[int], Callable[[CheckpointStore], None], set[str | None], str]] = {
    "the first save": ([], first, {None, "new"}, "new"),
    "a further save": ([100], further, {"old 100", "new"}, "new"),
    "a save in place of one": ([100], replace, {"old 100", "new"}, "new"),
    "a save in place of the newest of two": ([50, 100], replace, {"old 100", "new"}, "new"),
    "a rotation": ([100, 200, 300], rotate, {"old 300"}, "old 300"),
    "a save and a rotation": ([100, 200, 300], commit_and_rotate, {"old 300", "new"}, "new"),
}
# Checkpoints that rotation required not touch at any moment, besides the newest.
UNTOUCHED = {"a rotation": 100, "a save and a rotation": 300}


def prepare(folder: Path, steps: list[int]) -> CheckpointStore:
    folder.mkdir(parents=True)
    store = CheckpointStore(folder / "checkpoints", "run-1")
    store.folder.mkdir()
    for step in steps:
        store.commit(step, files(f"old {step}"))
    return store


def check(store: CheckpointStore, case: str, *, completed: bool) -> None:
    """Check that after a repair the old or the new checkpoint loads, whole, and nothing is left over."""
    _, _, allowed, required = CASES[case]
    store.repair()
    loaded, problems = store.newest_valid()
    mark = loaded and loaded.files["train_state.json"].decode()
    assert mark in ({required} if completed else allowed)
    assert problems == []
    assert mark is None or loaded.files == files(mark)
    if case in UNTOUCHED:
        untouched = store.load(store.folder / f"step-{UNTOUCHED[case]:07d}")
        assert untouched.files == files(f"old {UNTOUCHED[case]}")
    assert [name for name in os.listdir(store.folder) if not name.startswith("step-")] == []
