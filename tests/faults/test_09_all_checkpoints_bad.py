"""Every checkpoint is damaged or missing: the resume is refused; the run never starts over silently."""

from __future__ import annotations

import shutil

import pytest

pytestmark = [pytest.mark.fault(9), pytest.mark.slow]


def assert_refused(cli, stopped, contents):
    """Check for exit code 5, no training, and no changed file but the lock, which names its last holder."""
    before = contents(stopped, but=(".lock",))
    out = cli("resume=run", expect=5)
    assert "never starts over silently" in out and "repeat=" in out and "Traceback" not in out
    assert "valid loss" not in out and "train loss" not in out
    assert contents(stopped, but=(".lock",)) == before
    assert [path.name for path in cli.folder.iterdir()] == ["run"]
    return out


def test_every_damaged_checkpoint_is_named(cli, stopped, contents):
    damaged = ("step-0000002/manifest.json", "step-0000004/train_state.json", "step-0000006/adapters.safetensors")
    (stopped / "checkpoints" / damaged[0]).unlink()
    file = stopped / "checkpoints" / damaged[1]
    file.write_bytes(file.read_bytes()[:-10])
    file = stopped / "checkpoints" / damaged[2]
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    out = assert_refused(cli, stopped, contents)
    for name in damaged:
        assert f"checkpoints/{name}" in out


@pytest.mark.parametrize("lost", ["step-0000002 step-0000004 step-0000006", "."], ids=["each", "their folder"])
def test_missing_checkpoints_that_the_status_records_are_refused(cli, stopped, contents, lost):
    for name in lost.split():
        shutil.rmtree(stopped / "checkpoints" / name)
    out = assert_refused(cli, stopped, contents)
    assert "step 6 was saved and is gone" in out


def test_missing_checkpoints_are_refused_without_a_status_too(cli, stopped, contents):
    (stopped / "status.json").unlink()
    for step in (2, 4, 6):
        (stopped / f"checkpoints/step-{step:07d}/optimizer.safetensors").write_bytes(b"")
    out = assert_refused(cli, stopped, contents)
    assert out.count("optimizer.safetensors") == 3
