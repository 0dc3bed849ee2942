"""A resume with changed data or another adapter shape is refused with the difference, and changes nothing."""

from __future__ import annotations

import json
import shutil

import pytest

from runner.data.source import find_dataset

pytestmark = [pytest.mark.fault(17), pytest.mark.slow]


@pytest.fixture
def assert_refused(cli, stopped, contents):
    """`assert_refused("data.path=other")`: exit code 2, and the run is as it was (its log says what was tried)."""

    def check(*overrides: str) -> str:
        before = contents(stopped, but=(".lock", "run.log"))
        out = cli("resume=run", *overrides, expect=2)
        assert "Traceback" not in out and "valid loss" not in out and "train loss" not in out
        after = contents(stopped, but=(".lock", "run.log"))
        assert {name for name in before | after if before.get(name) != after.get(name)} == set()
        return out

    return check


@pytest.fixture
def data(cli):
    """A copy of the data that the run was trained on."""
    return shutil.copytree(find_dataset("builtin:tiny"), cli.folder / "data")


CHANGES = {
    "a train row changed": ("train", lambda lines: [lines[0].replace("swap", "swop"), *lines[1:]]),
    "a train row gone": ("train", lambda lines: lines[1:]),
    "two train rows swapped": ("train", lambda lines: [lines[1], lines[0], *lines[2:]]),
    "a valid row changed": ("valid", lambda lines: [*lines[:-1], lines[0]]),
    "a valid row more": ("valid", lambda lines: [*lines, lines[0]]),
}


def test_other_rows_are_refused_with_their_fingerprints_and_the_right_ones_go_on(
    data, assert_refused, cli, stopped, overrides, undisturbed, assert_ended_equal, cases
):
    state = json.loads((stopped / "checkpoints/step-0000006/train_state.json").read_text())
    for case in cases.some(list(CHANGES), quick=2):
        split, change = CHANGES[case]
        file = data / f"{split}.jsonl"
        own = file.read_text()
        file.write_text("\n".join(change(own.splitlines())) + "\n")
        out = assert_refused("data.path=data")
        assert f"the {'training' if split == 'train' else 'validation'} data changed" in out
        assert f"the fingerprint was {state['fingerprints'][f'data_{split}'][:16]} and is " in out
        file.write_text(own)
        cases.done()
    cli("resume=run")  # with the data that the first start named: a refusal leaves nothing behind
    assert_ended_equal(undisturbed(*overrides), stopped)


def test_another_adapter_shape_is_refused_on_the_line(assert_refused):
    out = assert_refused("lora.rank=4")
    assert "lora.rank was 8 and cannot become 4" in out


@pytest.mark.parametrize(
    ("own", "other", "says"),
    [
        ("  rank: 8\n", "  rank: 4\n", "lora.rank was 8 and cannot become 4"),
        ("  num_layers: 1\n", "  num_layers: 2\n", "lora.num_layers was 1 and cannot become 2"),
        ("  - self_attn.v_proj\n", "", "lora.keys was ['self_attn.q_proj', 'self_attn.v_proj'] and cannot become"),
    ],
    ids=["rank", "blocks", "layers"],
)
def test_another_adapter_shape_is_refused_that_was_written_into_the_stored_config(
    assert_refused, stopped, own, other, says
):
    text = (stopped / "config.yaml").read_text()
    assert own in text
    (stopped / "config.yaml").write_text(text.replace(own, other))
    assert says in assert_refused()
