"""Power cuts: what was not synced, bytes or names, is lost or not as luck has it; a valid checkpoint loads, always."""

from __future__ import annotations

import json
import random
import shutil

import pytest

import runner.common.filesystem as disk_module
from runner.checkpoints.store import CheckpointStore, step_name

pytestmark = pytest.mark.fault(6)


AND = ("checkpoint.keep_last=9", "hydra.run.dir=run")  # all states stay to be compared with


def files(mark):
    return {"adapters.safetensors": mark.encode() * 20, "train_state.json": mark.encode()}


class Life:
    """Random saves, replacements, rotations and repairs of one store, on a tape."""

    def __init__(self, store, held, tape, luck):
        self.store, self.held, self.tape, self.luck = store, dict(held), tape, luck
        # For each act: the events before it, those after it, and what the store holds before and after: step to mark.
        self.acts = []

    def do(self, act):
        begun, before = len(self.tape.events), dict(self.held)
        act()
        self.acts.append((begun, len(self.tape.events), before, dict(self.held)))

    def save(self):
        steps = sorted(self.held)
        new = (steps[-1] if steps else 0) + self.luck.randint(1, 50)
        step = self.luck.choice(steps) if steps and self.luck.random() < 0.4 else new
        mark = f"{step} {self.luck.random()}"
        self.store.commit(step, files(mark))
        self.held[step] = mark

    def rotate(self):
        keep = {step for step in self.held if self.luck.random() < 0.5}
        for step in self.store.rotate(keep):
            assert step not in keep
            del self.held[step]

    def may_hold(self, moment):
        """After that many events, per step the marks that may be there; None: that it may be gone."""
        may = {}
        for begun, ended, before, after in self.acts:
            if begun <= moment:
                states = [after] if moment >= ended else [before, after]
                may = {step: {state.get(step) for state in states} for step in before | after}
        return may


def live(store, held, instruments, luck):
    with instruments.Tape(piece=luck.choice([150, 1 << 30])) as tape:
        life = Life(store, held, tape, luck)
        life.do(store.repair)
        for _ in range(luck.randint(1, 6)):
            life.do(luck.choices([life.save, life.rotate, store.repair], [6, 3, 1])[0])
    return life


def found_after(folder):
    """What is there after the repair of the next start, by step; all of it is whole, and there is nothing else."""
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


def cut_lives(folder, instruments, luck, cuts, forget=""):
    """One store through `cuts` power cuts, in the middle of something; AssertionError if one took a save."""
    held, place = {}, folder / "0"
    place.mkdir()
    for number in range(1, cuts + 1):
        disk = instruments.PowerCut(place)
        life = live(CheckpointStore(place / "checkpoints", "run-1"), held, instruments, luck)
        moment = luck.randint(0, len(life.tape.events))
        for event in life.tape.events[:moment]:
            if event[0] != forget:
                disk.apply(event)
        place, looked_at = folder / str(number), folder / f"{number}-looked-at"
        disk.leave(place, luck if luck.random() < 0.8 else None)
        shutil.copytree(place, looked_at)
        held, may = found_after(looked_at), life.may_hold(moment)
        for step in may | held:
            assert held.get(step) in may.get(step, {None}), step


@pytest.mark.parametrize("chunk", range(5))
def test_after_a_power_cut_there_is_what_was_saved_and_what_was_being_saved_is_whole_or_not_there(
    tmp_path, instruments, cases, chunk, monkeypatch
):
    monkeypatch.setattr(disk_module, "_FULL_SYNC", None)
    for number in range(cases.of(full=25, quick=3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        cut_lives(folder, instruments, random.Random(f"{chunk} {number}"), cuts=4)
        shutil.rmtree(folder)
        cases.done(4)


def test_these_power_cuts_find_a_store_that_does_not_sync(tmp_path, instruments, monkeypatch):
    monkeypatch.setattr(disk_module, "_FULL_SYNC", None)
    lost = 0
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        try:
            cut_lives(tmp_path / str(number), instruments, random.Random(number), cuts=3, forget="sync")
        except AssertionError:
            lost += 1
    assert lost > 5


@pytest.fixture(scope="module")
def taped(tmp_path_factory, make_cli, instruments, faulty, overrides):
    """A run of the program that nothing stopped, all that it did to the disk, and the disk before it."""
    cli = make_cli(tmp_path_factory.mktemp("taped").resolve() / "here")
    disk, tape = instruments.PowerCut(cli.folder), cli.folder.parent / "tape"
    cli(*overrides, *AND, env=faulty(cli.folder, tape=tape))
    return cli.folder / "run", instruments.read_tape(tape), disk


@pytest.mark.slow
def test_a_run_whose_power_is_cut_at_any_moment_keeps_every_checkpoint_that_was_saved_and_ends_equal(
    make_cli, tmp_path, taped, overrides, assert_same_state, ended_equal, cases
):
    whole, events, disk = taped
    luck = random.Random(6)
    cuts = sorted(luck.choices(range(len(events) + 1), k=cases.of(full=1000, quick=40)))
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
        disk.leave(folder, luck if number % 4 else None)
        run = folder / "run"
        if number % cases.of(full=50, quick=20) == 10:
            cli = make_cli(folder)
            cli(*(["resume=run"] if (run / "config.yaml").exists() else [*overrides, *AND]))
            ended_equal(whole, run)
        else:
            store = CheckpointStore(run / "checkpoints", run_id)
            store.repair()
            found, wrong = store.newest_valid()
            assert wrong == [] and (found.checkpoint.step if found else 0) >= saved, moment
            if found:
                assert_same_state(found, whole)
        shutil.rmtree(folder)
        cases.done()
