"""Truncated files and flipped bits in a run's checkpoint are detected and named, and the previous one is used."""

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

RNG = random.Random(8)
NAMES = ("adapters.safetensors", "adapter_config.json", "optimizer.safetensors", "train_state.json", "manifest.json")


def newest(run: Path) -> tuple[LoadedCheckpoint | None, list[str]]:
    run_id = json.loads((run / "status.json").read_text())["run_id"]
    return CheckpointStore(run / "checkpoints", run_id).newest_valid(check=state_files.read_state)


def flipped(data: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


def assert_previous_is_used(run: Path, name: str) -> None:
    loaded, wrong = newest(run)
    assert loaded is not None and loaded.checkpoint.step == 4
    assert len(wrong) == 1 and f"checkpoints/step-0000006/{name}" in wrong[0]
    assert state_files.read_state(loaded).progress.step == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file_is_detected_and_the_previous_checkpoint_is_used(stopped, cases, name):
    file = stopped / "checkpoints/step-0000006" / name
    whole = file.read_bytes()
    lengths = {0, len(whole) - 1} | set(RNG.sample(range(1, len(whole) - 1), cases.of(full=18, quick=3)))
    for length in lengths:
        file.write_bytes(whole[:length])
        assert_previous_is_used(stopped, name)
        cases.done()
    file.write_bytes(whole)
    assert newest(stopped)[0].checkpoint.step == 6


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_detected_and_the_previous_checkpoint_is_used(stopped, cases, name):
    file = stopped / "checkpoints/step-0000006" / name
    whole = file.read_bytes()
    for at in RNG.sample(range(len(whole)), min(len(whole), cases.of(full=200, quick=20))):
        file.write_bytes(flipped(whole, at, RNG.randrange(8)))
        assert_previous_is_used(stopped, name)
        cases.done()
    file.write_bytes(whole)
    assert newest(stopped)[0].checkpoint.step == 6


@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors", "train_state.json"])
def test_a_truncated_file_with_a_matching_manifest_is_detected_by_its_content(stopped, cases, reseal, name):
    folder = stopped / "checkpoints/step-0000006"
    whole = (folder / name).read_bytes()
    end = len(whole.rstrip())  # JSON is the same without its last line break
    for length in {0, end - 1} | set(RNG.sample(range(1, end - 1), cases.of(full=18, quick=3))):
        (folder / name).write_bytes(whole[:length])
        reseal(folder)
        assert_previous_is_used(stopped, name)
        cases.done()


@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors"])
def test_a_non_finite_value_with_a_matching_manifest_is_detected(stopped, cases, reseal, name):
    folder = stopped / "checkpoints/step-0000006"
    whole = (folder / name).read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:begin])
    spans = [tensor["data_offsets"] for key, tensor in header.items() if tensor.get("dtype") == "F32"]
    for not_finite in (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff") * cases.of(full=50, quick=3):
        span = RNG.choice(spans)
        at = begin + RNG.randrange(span[0], span[1], 4)
        (folder / name).write_bytes(whole[:at] + not_finite + whole[at + 4 :])
        reseal(folder)
        assert_previous_is_used(stopped, name)
        cases.done()


@pytest.mark.parametrize("name", ["adapters.safetensors", "optimizer.safetensors", "train_state.json"])
def test_a_flipped_bit_with_a_matching_manifest_is_read_or_refused_with_a_reason(stopped, cases, reseal, name):
    """In the header and in JSON a digit may change without being noticed, but nothing crashes."""
    folder = stopped / "checkpoints/step-0000006"
    whole = (folder / name).read_bytes()
    end = len(whole) if name.endswith("json") else 8 + int.from_bytes(whole[:8], "little")
    refused, number = 0, min(end, cases.of(full=200, quick=20))
    for at in RNG.sample(range(end), number):
        (folder / name).write_bytes(flipped(whole, at, RNG.randrange(8)))
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
def test_an_impossible_train_state_with_a_matching_manifest_is_refused(stopped, reseal, name, value):
    folder = stopped / "checkpoints/step-0000006"
    data = json.loads((folder / "train_state.json").read_text())
    (folder / "train_state.json").write_text(json.dumps(data | {name: value}).replace("Infinity", "1e999"))
    reseal(folder)
    assert_previous_is_used(stopped, "train_state.json")


@pytest.mark.parametrize("damage", ["cut", "bit", "manifest"])
def test_a_resume_names_the_damage_uses_the_previous_checkpoint_and_ends_equal(
    cli, stopped, undisturbed, overrides, assert_ended_equal, damage
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
    assert_ended_equal(undisturbed(*overrides), stopped)
