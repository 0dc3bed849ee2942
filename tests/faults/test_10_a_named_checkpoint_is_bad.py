"""A checkpoint that was named and is damaged: an error, and no other one is used in its place."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.fault(10), pytest.mark.slow]


def test_it_is_named_and_nothing_is_trained_instead(cli, stopped, contents, cases):
    branch = cli.folder / "branch"
    for name in cases.some(["manifest.json", "optimizer.safetensors", "adapters.safetensors"], quick=1):
        file = stopped / "checkpoints/step-0000006" / name
        own = file.read_bytes()
        data = bytearray(own)
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
        before = contents(stopped)
        out = cli("resume=run/checkpoints/step-0000006", "hydra.run.dir=branch", expect=5)
        assert f"checkpoints/step-0000006/{name}" in out and "Traceback" not in out
        assert "valid loss" not in out and "step-0000004" not in out
        assert contents(stopped) == before
        left = {path.name for path in branch.iterdir()}
        assert left <= {".hydra", ".lock", "checkpoints"} and not list((branch / "checkpoints").iterdir())
        file.write_bytes(own)
        cases.done()
    # The directory that it was to go on in is not lost: a sound one may take it.
    out = cli("resume=run/checkpoints/step-0000004", "hydra.run.dir=branch")
    assert "step-0000004 at step 4" in out


def test_one_that_is_not_there_is_an_error_before_a_directory_is_made(cli, stopped, contents):
    before = contents(stopped)
    out = cli("resume=run/checkpoints/step-0000005", "hydra.run.dir=branch", expect=2)
    assert "step-0000005: there is no such directory" in out
    assert contents(stopped) == before and not (cli.folder / "branch").exists()
