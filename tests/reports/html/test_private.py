"""Nothing private of the machine stands in a page."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from runner.reports.html.private import Privacy


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with a project in it, which is the working directory."""
    home = tmp_path / "home" / "alice smith"
    (home / "project").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "project")
    return home


def test_paths_are_relative_or_cut(home: Path) -> None:
    privacy = Privacy(home / "project/outputs/run")
    project = home / "project"
    assert privacy.text(f"resume={project}/outputs/run") == "resume=outputs/run"
    assert privacy.text(f"{project}/outputs/run/config.yaml: bad") == "outputs/run/config.yaml: bad"
    assert privacy.text(f"data in '{project}/my data'") == "data in 'my data'"
    assert privacy.text(f"{home}/models/x") == "~/models/x"
    assert privacy.text("/home/bob/models/x and /Users/eve/y") == "~/models/x and ~/y"
    assert privacy.text("--model /data/models/qwen --x") == "--model …/qwen --x"
    assert privacy.text("C:/work/models/qwen") == "…/qwen"
    assert privacy.text("1/2 and/or https://example.com/a/b outputs/a/b") == (
        "1/2 and/or https://example.com/a/b outputs/a/b"
    )


def test_a_run_outside_the_working_directory_is_known_by_its_name(home: Path, tmp_path: Path) -> None:
    privacy = Privacy(tmp_path / "elsewhere" / "run")
    assert privacy.text(f"resume={tmp_path}/elsewhere/run/checkpoints/step-1") == "resume=run/checkpoints/step-1"


def test_names_of_hosts_are_left_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "bobs-mac.fritz.box")
    privacy = Privacy(home / "run", hosts=["alices-laptop.local", None, 7])
    text = "in use by pid 7 on alices-laptop since 10:00, alices-laptop.local, not malices-laptops"
    assert privacy.text(text) == "in use by pid 7 on its host since 10:00, its host, not malices-laptops"
    assert privacy.text("on bobs-mac.") == "on its host."


def test_control_characters_are_shown_as_dots_and_rows_of_data_keep_their_paths(home: Path) -> None:
    privacy = Privacy(home / "run")
    part = {"kind": "samples", "items": [{"prompt": "cat /home/bob/x\x1b[31m\u202e"}]}
    assert privacy.clean(part) == {"kind": "samples", "items": [{"prompt": "cat /home/bob/x·[31m·"}]}
    assert privacy.clean({"a": [1, None, 2.5], "href": "./a", "b": Path("/x/y/z")}) == {
        "a": [1, None, 2.5],
        "href": "./a",
        "b": "…/z",
    }
