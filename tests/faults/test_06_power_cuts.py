"""Power cuts: unsynced bytes and names are lost at random; a valid checkpoint always loads."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from runner.checkpoints.store import CheckpointStore, step_name
from runner.common import filesystem

pytestmark = pytest.mark.fault(6)


KEEP_ALL = ("checkpoint.keep_last=9", "hydra.run.dir=run")  # so that all states can be compared


def files(mark):
    return {"adapters.safetensors": mark.encode() * 20, "train_state.json": mark.encode()}


class StoreLife:
    """Random saves, replacements, rotations and repairs of one store, on a tape."""

    def __init__(self, store, held, tape, rng):
        self.store, self.held, self.tape, self.rng = store, dict(held), tape, rng
        # For each action: number of events before and after it, and marks in the store by step before and after it.
        self.actions = []

    def do(self, action):
        begun, before = len(self.tape.events), dict(self.held)
        action()
        self.actions.append((begun, len(self.tape.events), before, dict(self.held)))

    def save(self):
        steps = sorted(self.held)
        new = (steps[-1] if steps else 0) + self.rng.randint(1, 50)
        step = self.rng.choice(steps) if steps and self.rng.random() < 0.4 else new
        mark = f"{step} {self.rng.random()}"
        self.store.commit(step, files(mark))
        self.held[step] = mark

    def rotate(self):
        keep = {step for step in self.held if self.rng.random() < 0.5}
        for step in self.store.rotate(keep):
            assert step not in keep
            del self.held[step]

    def possible_marks(self, moment):
        """Return, by step, the marks that the store may hold after `moment` events; None if the step may be missing."""
        possible = {}
        for begun, ended, before, after in self.actions:
            if begun <= moment:
                states = [after] if moment >= ended else [before, after]
                possible = {step: {state.get(step) for state in states} for step in before | after}
        return possible


def live(store, held, instruments, rng):
    with instruments.Tape(piece=rng.choice([150, 1 << 30])) as tape:
        life = StoreLife(store, held, tape, rng)
        life.do(store.repair)
        for _ in range(rng.randint(1, 6)):
            life.do(rng.choices([life.save, life.rotate, store.repair], [6, 3, 1])[0])
    return life


def marks_after_repair(folder):
    """Return the marks in the store after the next start repaired it, by step; nothing else may be left."""
    store = CheckpointStore(folder / "checkpoints", "run-1")
    store.repair()
    found = {one.step: store.load(one.path).files for one in store.checkpoints()}
    marks = {step: data["train_state.json"].decode() for step, data in found.items()}
    assert found == {step: files(mark) for step, mark in marks.items()}
    loaded, wrong = store.newest_valid()
    assert wrong == [] and (loaded and loaded.checkpoint.step) == max(found, default=None)
    names = {path.name for path in store.folder.iterdir()} if store.folder.exists() else set()
    assert names == {step_name(step) for step in found}
    return marks


def cut_power(folder, instruments, rng, cuts, forget=""):
    """Take one store through `cuts` power cuts at random moments; AssertionError if a committed save is lost."""
    held, current = {}, folder / "0"
    current.mkdir()
    for number in range(1, cuts + 1):
        disk = instruments.PowerCut(current)
        life = live(CheckpointStore(current / "checkpoints", "run-1"), held, instruments, rng)
        moment = rng.randint(0, len(life.tape.events))
        for event in life.tape.events[:moment]:
            if event[0] != forget:
                disk.apply(event)
        current, copy = folder / str(number), folder / f"{number}-copy"
        disk.leave(current, rng if rng.random() < 0.8 else None)
        shutil.copytree(current, copy)
        held, possible = marks_after_repair(copy), life.possible_marks(moment)
        for step in possible | held:
            assert held.get(step) in possible.get(step, {None}), step


@pytest.mark.parametrize("chunk", range(5))
def test_a_power_cut_loses_no_saved_checkpoint_and_leaves_none_incomplete(
    tmp_path, instruments, cases, chunk, monkeypatch
):
    monkeypatch.setattr(filesystem, "_FULL_SYNC", None)
    for number in range(cases.of(full=25, quick=3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        cut_power(folder, instruments, random.Random(f"{chunk} {number}"), cuts=4)
        shutil.rmtree(folder)
        cases.done(4)


def test_the_simulated_power_cuts_detect_a_store_that_does_not_sync(tmp_path, instruments, monkeypatch):
    monkeypatch.setattr(filesystem, "_FULL_SYNC", None)
    lost = 0
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        try:
            cut_power(tmp_path / str(number), instruments, random.Random(number), cuts=3, forget="sync")
        except AssertionError:
            lost += 1
    assert lost > 5


@pytest.fixture(scope="module")
def recorded_run(tmp_path_factory, make_cli, instruments, fault_environment, overrides):
    """Return an undisturbed run, everything that it did to the disk, and the disk before it."""
    cli = make_cli(tmp_path_factory.mktemp("recorded_run").resolve() / "here")
    disk, tape = instruments.PowerCut(cli.folder), cli.folder.parent / "tape"
    cli(*overrides, *KEEP_ALL, env=fault_environment(cli.folder, tape=tape))
    return cli.folder / "run", instruments.read_tape(tape), disk


@pytest.mark.slow
def test_a_power_cut_at_any_moment_of_a_run_loses_no_saved_checkpoint_and_the_run_resumes_equal(
    make_cli, tmp_path, recorded_run, overrides, assert_same_state, assert_ended_equal, cases
):
    whole, events, disk = recorded_run
    rng = random.Random(6)
    cuts = sorted(rng.choices(range(len(events) + 1), k=cases.of(full=1000, quick=40)))
    run_id = json.loads((whole / "status.json").read_text())["run_id"]
    saved = renamed = done = 0
    for number, moment in enumerate(cuts):
        for call, path, *rest in events[done:moment]:
            disk.apply((call, path, *rest))
            if call == "rename" and "/checkpoints/step-" in rest[0]:
                renamed = int(rest[0][-7:])
            if call == "sync" and path.endswith("/checkpoints"):
                saved = renamed
        done = moment
        folder = tmp_path / str(number)
        disk.leave(folder, rng if number % 4 else None)
        run = folder / "run"
        if number % cases.of(full=50, quick=20) == 10:
            cli = make_cli(folder)
            cli(*(["resume=run"] if (run / "config.yaml").exists() else [*overrides, *KEEP_ALL]))
            assert_ended_equal(whole, run)
        else:
            store = CheckpointStore(run / "checkpoints", run_id)
            store.repair()
            found, wrong = store.newest_valid()
            assert wrong == [] and (found.checkpoint.step if found else 0) >= saved, moment
            if found:
                assert_same_state(found, whole)
        shutil.rmtree(folder)
        cases.done()
