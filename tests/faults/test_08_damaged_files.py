"""Truncated files and flipped bits in a real run's checkpoint: each is found and named, and the one before is used."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from runner.checkpoints.store import CheckpointStore
from runner.checkpoints.verify import LoadedCheckpoint
from runner.common.errors import CheckpointError
from runner.training import state_files

pytestmark = [pytest.mark.fault(8), pytest.mark.slow]

LUCK = random.Random(8)
NAMES = ("adapters.safetensors", "adapter_config.json", "optimizer.safetensors", "train_state.json", "manifest.json")


def newest(run: Path) -> tuple[LoadedCheckpoint | None, list[str]]:
    run_id = json.loads((run / "status.json").read_text())["run_id"]
    return CheckpointStore(run / "checkpoints", run_id).newest_valid(check=state_files.read_state)


def flipped(data: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


def assert_the_one_before_is_used(run: Path, name: str) -> None:
    loaded, wrong = newest(run)
    assert loaded is not None and loaded.checkpoint.step == 4
    assert len(wrong) == 1 and f"checkpoints/step-0000006/{name}" in wrong[0]
    assert state_files.read_state(loaded).progress.step == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_at_any_length_is_found_and_the_one_before_is_used(stopped, cases, name):
    file = stopped / "checkpoints/step-0000006" / name
    whole = file.read_bytes()
    lengths = {0, len(whole) - 1} | set(LUCK.sample(range(1, len(whole) - 1), cases.of(full=18, quick=3)))
    for length in lengths:
        file.write_bytes(whole[:length])
        assert_the_one_before_is_used(stopped, name)
        cases.done()
    file.write_bytes(whole)
    assert newest(stopped)[0].checkpoint.step == 6


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_anywhere_is_found_and_the_one_before_is_used(stopped, cases, name):
    file = stopped / "checkpoints/step-0000006" / name
    whole = file.read_bytes()
    for at in LUCK.sample(range(len(whole)), min(len(whole), cases.of(full=200, quick=20))):
        file.write_bytes(flipped(whole, at, LUCK.randrange(8)))
        assert_the_one_before_is_used(stopped, name)
        cases.done()
    file.write_bytes(whole)
    assert newest(stopped)[0].checkpoint.step == 6


@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors", "train_state.json"])
def test_a_cut_that_a_new_manifest_vouches_for_is_found_by_what_the_file_holds(stopped, cases, reseal, name):
    folder = stopped / "checkpoints/step-0000006"
    whole = (folder / name).read_bytes()
    end = len(whole.rstrip())  # without its last line break, JSON says the same
    for length in {0, end - 1} | set(LUCK.sample(range(1, end - 1), cases.of(full=18, quick=3))):
        (folder / name).write_bytes(whole[:length])
        reseal(folder)
        assert_the_one_before_is_used(stopped, name)
        cases.done()


@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors"])
def test_a_number_that_is_not_finite_is_found_under_a_new_manifest(stopped, cases, reseal, name):
    folder = stopped / "checkpoints/step-0000006"
    whole = (folder / name).read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:begin])
    spans = [about["data_offsets"] for key, about in header.items() if about.get("dtype") == "F32"]
    for not_finite in (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff") * cases.of(full=50, quick=3):
        span = LUCK.choice(spans)
        at = begin + LUCK.randrange(span[0], span[1], 4)
        (folder / name).write_bytes(whole[:at] + not_finite + whole[at + 4 :])
        reseal(folder)
        assert_the_one_before_is_used(stopped, name)
        cases.done()


@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors", "train_state.json"])
def test_a_bit_that_a_new_manifest_vouches_for_is_refused_with_a_reason_or_read_and_nothing_else(
    stopped, cases, reseal, name
):
    """In the header and in JSON: a digit may become another unseen, but nothing crashes."""
    folder = stopped / "checkpoints/step-0000006"
    whole = (folder / name).read_bytes()
    end = len(whole) if name.endswith("json") else 8 + int.from_bytes(whole[:8], "little")
    refused, number = 0, min(end, cases.of(full=200, quick=20))
    for at in LUCK.sample(range(end), number):
        (folder / name).write_bytes(flipped(whole, at, LUCK.randrange(8)))
        reseal(folder)
        loaded, wrong = newest(stopped)
        assert loaded is not None and loaded.checkpoint.step == (4 if wrong else 6)
        assert all("step-0000006" in line for line in wrong)
        refused += bool(wrong)
        cases.done()
    assert refused > number / 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metrics_offset", 1e999),
        ("metrics_offset", -1),
        ("position", {"epoch": 0, "batch": 1e999}),
        ("seconds", "long"),
    ],
    ids=str,
)
def test_a_state_that_cannot_be_is_refused_under_a_new_manifest(stopped, reseal, name, value):
    folder = stopped / "checkpoints/step-0000006"
    data = json.loads((folder / "train_state.json").read_text())
    (folder / "train_state.json").write_text(json.dumps(data | {name: value}).replace("Infinity", "1e999"))
    reseal(folder)
    assert_the_one_before_is_used(stopped, "train_state.json")


@pytest.mark.parametrize("damage", ["cut", "bit", "manifest"])
def test_a_resume_names_what_is_damaged_goes_on_from_the_one_before_and_ends_equal(
    cli, stopped, undisturbed, overrides, ended_equal, damage
):
    folder = stopped / "checkpoints/step-0000006"
    name = {"cut": "adapters.safetensors", "bit": "optimizer.safetensors", "manifest": "manifest.json"}[damage]
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1] if damage == "cut" else flipped(whole, len(whole) // 2, 3))
    with pytest.raises(CheckpointError):
        CheckpointStore(stopped / "checkpoints", "").load(folder)
    out = cli("resume=run")
    assert "damaged, not used: " in out and f"step-0000006/{name}" in out
    assert "step-0000004 at step 4" in out
    assert "damaged, not used: " in (stopped / "run.log").read_text()
    ended_equal(undisturbed(*overrides), stopped)
