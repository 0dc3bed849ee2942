"""The commands in messages can be pasted into a shell as they are, whatever the path."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from runner.common.commands import repeat_command, resume_command, warm_start_command


def test_commands_quote_paths_and_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, program = tmp_path / "a b's", ["python", "-m", "runner"]
    assert shlex.split(resume_command(run)) == [*program, "resume=a b's"]
    assert shlex.split(repeat_command(run, "seed=1")) == [*program, "repeat=a b's", "seed=1"]
    assert shlex.split(warm_start_command(run, run / "adapters")) == [
        *program,
        "repeat=a b's",
        "adapter=a b's/adapters",
    ]
