"""A damaged checkpoint given to resume= is an error; no other one is used in its place."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.fault(10), pytest.mark.slow]


def test_a_damaged_checkpoint_given_to_resume_is_an_error_and_nothing_is_trained(cli, stopped, contents, cases):
    branch = cli.folder / "branch"
    for name in cases.some(["manifest.json", "optimizer.safetensors", "adapters.safetensors"], quick=1):
        file = stopped / "checkpoints/step-0000006" / name
        original = file.read_bytes()
        data = bytearray(original)
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        before = contents(stopped)
        out = cli("resume=run/checkpoints/step-0000006", "hydra.run.dir=branch", expect=5)
        assert f"checkpoints/step-0000006/{name}" in out and "Traceback" not in out
        assert "valid loss" not in out and "step-0000004" not in out
        assert contents(stopped) == before
        assert not branch.exists()
        file.write_bytes(original)
        cases.done()
    out = cli("resume=run/checkpoints/step-0000004", "hydra.run.dir=branch")
    assert "step-0000004 at step 4" in out


def test_a_missing_checkpoint_given_to_resume_is_an_error_before_a_directory_is_created(cli, stopped, contents):
    before = contents(stopped)
    out = cli("resume=run/checkpoints/step-0000005", "hydra.run.dir=branch", expect=2)
    assert "step-0000005: there is no such directory" in out
    assert contents(stopped) == before and not (cli.folder / "branch").exists()
