"""Every checkpoint is damaged or gone: the resume is refused, and nothing starts over in silence."""

from __future__ import annotations

import shutil

import pytest

pytestmark = [pytest.mark.fault(9), pytest.mark.slow]


def assert_refused(cli, stopped, contents):
    """Exit code 5, nothing trained, no file of the run changed (its lock says who holds it, nothing else)."""
    before = contents(stopped, but=(".lock",))
    out = cli("resume=run", expect=5)
    assert "never starts over silently" in out and "repeat=" in out and "Traceback" not in out
    assert "valid loss" not in out and "train loss" not in out
    assert contents(stopped, but=(".lock",)) == before
    assert [path.name for path in cli.folder.iterdir()] == ["run"]
    return out


def test_where_each_is_damaged_in_its_own_way_each_is_named(cli, stopped, contents):
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
def test_where_all_are_gone_the_run_knows_that_there_was_one(cli, stopped, contents, lost):
    for name in lost.split():
        shutil.rmtree(stopped / "checkpoints" / name)
    out = assert_refused(cli, stopped, contents)
    assert "step 6 was saved and is gone" in out


def test_where_the_status_is_lost_as_well_it_is_refused_too(cli, stopped, contents):
    (stopped / "status.json").unlink()
    for step in (2, 4, 6):
        (stopped / f"checkpoints/step-{step:07d}/optimizer.safetensors").write_bytes(b"")
    out = assert_refused(cli, stopped, contents)
    assert out.count("optimizer.safetensors") == 3
