"""Symbolic links, names that leave the run's directory, and FIFOs: nothing outside is touched, nothing hangs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from runner.checkpoints.store import CheckpointStore
from runner.common.errors import CheckpointError

pytestmark = [pytest.mark.fault(21), pytest.mark.slow]


@pytest.fixture
def outside(cli, contents):
    """A folder with a file and an empty folder, which must not change during the test."""
    folder = cli.folder / "outside"
    (folder / "empty").mkdir(parents=True)
    (folder / "file").write_text("precious\n")
    before = contents(folder)
    yield folder
    after = contents(folder)
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()


@pytest.fixture
def at_once(cli):
    """`at_once("ls", "run")`: exit code and output of the program, which must end within a minute."""

    def run(*overrides: str) -> tuple[int, str]:
        process = cli.start(*overrides)
        try:
            out, _ = process.communicate(timeout=60)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        assert "Traceback" not in out, out
        return process.returncode, out

    return run


def link(path: Path, to: Path) -> None:
    """Replace what is at `path` by a relative link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(to, path.parent))


# Path of the link, its target, and whether the run can be resumed (the link is replaced, or is not used).
LINKS = {
    "metrics.jsonl": ("file", False),
    "samples.jsonl": ("file", False),
    "row_losses.jsonl": ("file", False),
    "run.log": ("file", False),
    ".lock": ("file", False),
    "status.json": ("file", None),
    "metrics.csv": ("file", True),
    "adapters": ("empty", True),
    ".adapters.new": ("empty", True),
    ".adapters.old": ("empty", None),
    "checkpoints": ("empty", False),
    "checkpoints/step-0000006": ("empty", False),  # ignored, and in the way of the next save of that step
    "checkpoints/step-0000006/adapters.safetensors": ("file", True),
    "checkpoints/step-0000006/manifest.json": ("file", True),
    "checkpoints/step-0000006/extra": ("file", True),
    "checkpoints/.tmp-step-0000008-0123abcd": ("empty", True),
    "checkpoints/.del-step-0000002-0123abcd": ("empty", True),
    "checkpoints/.old-step-0000002-0123abcd": ("empty", True),
}


@pytest.mark.long
def test_a_resume_does_not_touch_the_target_of_a_link_in_the_run(cli, stopped, outside, at_once, contents, cases):
    before = contents(outside)
    for name in cases.some(list(LINKS), quick=4):
        to, resumes = LINKS[name]
        run = shutil.copytree(stopped, cli.folder / "copy")
        link(run / name, outside / to)
        code, out = at_once("resume=copy", "loggers=csv")
        assert contents(outside) == before, name
        assert resumes is None or (code == 0) == resumes, f"{name}: {out}"
        assert code in (0, 5, 74), f"{name}: {out}"
        assert code == 0 or Path(name).name in out or name == ".lock", out
        shutil.rmtree(run)
        cases.done()


@pytest.mark.parametrize("name", [".hydra", "run.log", "checkpoints"])
def test_a_new_run_is_refused_where_a_link_leads_out_of_its_directory(cli, outside, name):
    (cli.folder / "run").mkdir()
    link(cli.folder / "run" / name, outside / ("file" if name == "run.log" else "empty"))
    out = cli("model=tiny", "data=tiny", "hydra.run.dir=run", expect=2)
    assert f"run/{name}" in out and "symbolic link" in out and "Traceback" not in out


def test_a_run_can_be_reached_through_a_link(cli, stopped, outside, overrides, undisturbed, assert_ended_equal):
    (cli.folder / "far").mkdir()
    stopped.rename(cli.folder / "far/run")
    (cli.folder / "near").symlink_to("far")
    (cli.folder / "it").symlink_to("near/run")
    cli("resume=it")
    assert (cli.folder / "it").is_symlink()
    assert_ended_equal(undisturbed(*overrides), cli.folder / "far/run")


def test_checkpoints_outside_the_run_directory_are_refused(cli, stopped, outside, contents, cases):
    """Both for a new run and for a run whose stored config has such a name."""
    text = (stopped / "config.yaml").read_text()
    for name in cases.some(["../outside", "/tmp", "a/b", ".", "..", ".hidden"], quick=2):
        out = cli("model=tiny", "data=tiny", f"checkpoint.dir={name}", "hydra.run.dir=new", expect=2)
        assert (
            "checkpoint.dir=" in out
            and "name of a folder inside the run directory" in out
            and not (cli.folder / "new").exists()
        )
        (stopped / "config.yaml").write_text(text.replace("  dir: checkpoints\n", f"  dir: {name}\n"))
        before = contents(stopped)
        out = cli("resume=run", expect=2)
        assert "name of a folder inside the run directory" in out and "Traceback" not in out
        assert contents(stopped) == before
        cases.done()


@pytest.mark.parametrize("name", ["../../../outside/file", "/etc/hostname", "..", "a/../../x", "step-0000006/x"])
def test_a_sealed_manifest_that_names_a_file_outside_the_checkpoint_is_refused(stopped, outside, reseal, name):
    from runner.checkpoints import manifest

    folder = stopped / "checkpoints/step-0000006"
    record = manifest.read((folder / manifest.NAME).read_bytes())
    files = {one: {"size": about.size, "sha256": about.sha256} for one, about in record.files.items()}
    stolen = {"size": 9, "sha256": "0" * 64}
    reseal(folder, files={**files, name: stolen})
    store = CheckpointStore(stopped / "checkpoints", record.run_id)
    with pytest.raises(CheckpointError, match="is not allowed"):
        store.load(folder)
    loaded, wrong = store.newest_valid()
    assert loaded.checkpoint.step == 4 and len(wrong) == 1


# Path of the pipe, and whether the run can be resumed.
PIPES = {
    "checkpoints/step-0000006/adapters.safetensors": True,
    "checkpoints/step-0000006/manifest.json": True,
    "config.yaml": False,
    "status.json": True,
    "metrics.jsonl": False,
    "samples.jsonl": False,
    "row_losses.jsonl": False,
    "run.log": False,
    "metrics.csv": True,
    ".lock": False,
}


def test_a_pipe_in_place_of_a_file_does_not_hang(cli, stopped, at_once, cases):
    for name in cases.some(list(PIPES), quick=2):
        run = shutil.copytree(stopped, cli.folder / "copy")
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        for verb in ("ls", "show"):
            code, out = at_once(verb, "copy")
            assert code == 0 or (verb, name) == ("show", "config.yaml"), out
        if name != "config.yaml":
            code, out = at_once("resume=copy/checkpoints/step-0000004", "hydra.run.dir=branch")
            assert (code == 0) == (name not in ("metrics.jsonl", "samples.jsonl", "row_losses.jsonl")), f"{name}: {out}"
        code, out = at_once("resume=copy", "loggers=csv")
        assert (code == 0) == PIPES[name], f"{name}: {out}"
        assert code in (0, 2, 5, 74)
        shutil.rmtree(cli.folder / "branch", ignore_errors=True)
        shutil.rmtree(run)
        cases.done()


def test_a_pipe_that_another_process_holds_open_is_not_read_as_a_status(cli, stopped, at_once):
    """A read of such a pipe would wait for data."""
    (stopped / "status.json").unlink()
    os.mkfifo(stopped / "status.json")
    handle = os.open(stopped / "status.json", os.O_RDWR)
    try:
        assert at_once("ls", "run")[0] == 0
        assert at_once("show", "run")[0] == 0
    finally:
        os.close(handle)
