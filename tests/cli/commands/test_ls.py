"""`runner ls`: what is listed, in which order, with which settings, and that nothing damaged stops it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner.cli.commands import ls
from runner.common.errors import ConfigError
from runner.config.schema import Config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def outputs(
    tiny: Callable[..., Config], train_once: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with two runs, a sweep of three jobs of which one failed, and the working directory above it."""
    monkeypatch.chdir(tmp_path)
    first = train_once(tiny(), tmp_path / "outputs/2026-11-24/10-00-00")
    status = json.loads((first / "status.json").read_text())

    def again(name: str, rank: int, updated: str, **changes: Any) -> None:
        path = tmp_path / "outputs" / name
        if path != first:
            shutil.copytree(first, path)
        text = (first / "config.yaml").read_text()
        (path / "config.yaml").write_text(text.replace("rank: 8", f"rank: {rank}"))
        (path / "status.json").write_text(json.dumps(status | {"updated": f"2026-11-24T{updated}Z"} | changes))

    for number, (rank, loss) in enumerate([(4, 3.0), (16, 1.5), (32, 2.0)]):
        failed = {"state": "failed", "reason": "the disk is full"} if number == 2 else {}
        best = {"step": 12, "valid_loss": loss}
        again(f"sweeps/2026-11-24/11-00-00/{number}", rank, "11:00:00", best=best, **failed)
    (tmp_path / "outputs/sweeps/2026-11-24/11-00-00/multirun.yaml").write_text("hydra: {}\n")
    again("2026-11-24/12-00-00", 2, "12:00:00", best={"step": 6, "valid_loss": 2.5}, step=6, state="stopped")
    again("2026-11-24/10-00-00", 8, "10:00:00")
    return tmp_path / "outputs"


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines that `runner ls` prints."""
    assert ls.run(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def test_a_line_for_each_run_and_sweep_newest_first(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    titles, *lines = listed(capsys)
    assert [line.split()[0] for line in lines] == [
        "outputs/2026-11-24/12-00-00",
        "outputs/sweeps/2026-11-24/11-00-00",
        "outputs/2026-11-24/10-00-00",
    ]
    assert titles.split() == ["run", "state", "step", "valid_loss", "age", "size", "settings", "that", "differ"]
    assert " stopped " in lines[0] and " 6/12 " in lines[0] and " 2.5000 @6 " in lines[0]
    assert " 3 jobs " in lines[1] and "1.5000 in 1" in lines[1]
    settings = ["rank=2", "rank=4,16,32  2 finished, 1 failed", "rank=8"]
    assert all(line.endswith(f"  {end}") for line, end in zip(lines, settings, strict=True))


def test_a_sweep_with_its_runs(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys, "--runs")
    assert [line.split()[0] for line in lines[3:6]] == ["0", "1", "2"]
    assert "rank=16" in lines[4] and lines[5].endswith("failed: the disk is full")


def test_sort_and_limit(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def names(*arguments: str) -> list[str]:
        document = json.loads("\n".join(listed(capsys, "--json", *arguments)))
        return [Path(entry["path"]).name for entry in document["entries"]]

    assert names("--sort", "best") == ["11-00-00", "12-00-00", "10-00-00"]
    assert names("--sort", "step") == ["11-00-00", "10-00-00", "12-00-00"]
    assert names("--sort", "size")[0] == "11-00-00"
    assert names("--limit", "1") == ["12-00-00"]
    assert "2 more" in listed(capsys, "--limit", "1")[-1]
    # Only what is listed counts for what differs.
    assert "rank" not in "\n".join(listed(capsys, "--limit", "1"))


def test_json_holds_numbers_and_only_settings_that_differ(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads("\n".join(listed(capsys, "--json", "--runs")))
    assert document["differing"] == ["lora.rank"]
    stopped, sweep, _ = document["entries"]
    assert stopped["kind"] == "run" and stopped["settings"] == {"lora.rank": 2}
    assert stopped["best"] == {"valid_loss": 2.5, "step": 6} and stopped["updated"] == "2026-11-24T12:00:00Z"
    assert sweep["states"] == {"finished": 2, "failed": 1}
    assert sweep["best"] == {"run": "1", "valid_loss": 1.5, "step": 12}
    assert [run["reason"] for run in sweep["runs"]] == [None, None, "the disk is full"]


def test_a_run_or_a_sweep_itself_can_be_listed(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(listed(capsys, "outputs/2026-11-24/10-00-00")) == 2
    assert len(listed(capsys, "outputs/sweeps/2026-11-24/11-00-00", "--runs")) == 5


def test_damaged_runs_are_listed_with_the_reason(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (outputs / "2026-11-24/10-00-00/config.yaml").write_text("a: &a [1]\nb: [*a, *a]\n")
    (outputs / "2026-11-24/12-00-00/status.json").write_text("\x1b[31m")
    (outputs / "sweeps/2026-11-24/11-00-00/1/config.yaml").unlink()
    text = "\n".join(listed(capsys, "--runs"))
    assert "YAML alias" in text and "status.json cannot be understood" in text and "config.yaml is missing" in text
    assert "\x1b" not in text


@pytest.mark.usefixtures("outputs")
def test_a_folder_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scan = os.scandir

    def denied(path: Any) -> Any:
        if str(path) == "outputs/2026-11-24":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert ls.run([]) == 0
    assert capsys.readouterr().err == "outputs/2026-11-24 is not listed: Permission denied\n"


def test_an_empty_folder_is_reported_and_a_missing_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert listed(capsys) == ["No runs below outputs. The first one: python -m runner experiment=first_run"]
    assert json.loads("\n".join(listed(capsys, "--json")))["entries"] == []
    for arguments, reason in (
        (["nowhere"], "no such folder, and no run below outputs has that name. What there is: python -m runner ls"),
        (["<3"], "'<3' is no filter"),
        (["--sort", "nam"], "Did you mean 'name'"),
        (["--limit", "0"], "1"),
    ):
        with pytest.raises(ConfigError, match=reason):
            ls.run(arguments)


@pytest.mark.parametrize("width", [80, 160])
def test_on_a_terminal_every_line_fits_the_width(outputs: Path, width: int) -> None:
    """In a process of its own, at a real pseudo-terminal."""
    near, far = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "xterm", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "runner", "ls", "--runs"], stdout=far, env=environment)
    os.close(far)
    text = b""
    while True:
        try:
            piece = os.read(near, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        text += piece
    assert process.wait() == 0
    os.close(near)
    lines = [line.replace("\x1b[1m", "").replace("\x1b[0m", "") for line in text.decode().splitlines()]
    lines = [line.replace("\x1b[2m", "") for line in lines]
    assert max(len(line) for line in lines) <= width and "\x1b" not in "".join(lines)
    assert lines[0].split()[0] == ("run" if width == 160 else "below")
    assert any("rank=16" in line for line in lines)


def test_nothing_heavy_is_imported(outputs: Path) -> None:
    code = (
        "import sys; from runner.__main__ import main; main(['ls']); main(['ls', '--json']);"
        "print([m for m in ('mlx', 'mlx.core', 'hydra', 'omegaconf', 'numpy', 'transformers') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"
