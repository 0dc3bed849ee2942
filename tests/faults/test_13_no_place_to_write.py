"""A directory that cannot be written is reported with its path before the model is loaded."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.fault(13)

# A model that does not exist: loading it is an error.
OVERRIDES = ("model.path=nowhere/base.gguf", "data=tiny")


@pytest.fixture
def read_only(cli):
    """`read_only(*arguments)`: run the program with the folder `place` mounted read-only."""

    def start(*arguments: str) -> tuple[int, str]:
        script = (
            "mkdir place.rw && mount -t tmpfs tmpfs place.rw && cp -a place/. place.rw && mount --move place.rw place "
            "&& mount -o remount,ro place && exec "
        )
        inner = script + shlex.join([sys.executable, "-m", "runner", *arguments])
        (cli.folder / "place").mkdir(exist_ok=True)
        probe = ["unshare", "--mount", "--map-root-user", "--user", "sh", "-c"]
        if sys.platform != "linux" or not shutil.which("unshare"):
            pytest.skip("mounts a tmpfs in a namespace of its own")
        if subprocess.run([*probe, "mount -t tmpfs tmpfs /mnt"], capture_output=True).returncode != 0:
            pytest.skip("file systems cannot be mounted here")
        done = subprocess.run(
            [*probe, inner], cwd=cli.folder, env=cli.environment, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr

    return start


def assert_reported(code: int, out: str, path: str) -> None:
    assert code == 74, out
    assert path in out and "Traceback" not in out
    assert "nowhere/base.gguf" not in out and "model  " not in out


def test_the_same_command_loads_the_model_in_a_writable_directory(cli):
    assert "nowhere/base.gguf" in cli(*OVERRIDES, "hydra.run.dir=place/run", expect=2)


def test_a_read_only_file_system_is_reported_for_a_new_run(cli, read_only):
    code, out = read_only(*OVERRIDES, "hydra.run.dir=place/run")
    assert_reported(code, out, "place/run")
    assert "Read-only" in out


@pytest.mark.slow
def test_a_read_only_file_system_is_reported_for_a_resume_and_the_run_is_unchanged(cli, read_only, stopped, contents):
    (cli.folder / "place").mkdir()
    stopped.rename(cli.folder / "place/run")
    before = contents(cli.folder / "place/run")
    code, out = read_only("resume=place/run", OVERRIDES[0])
    assert_reported(code, out, "place/run")
    assert "Read-only" in out
    assert contents(cli.folder / "place/run") == before


def test_a_read_only_file_system_is_reported_for_a_sweep(cli, read_only):
    code, out = read_only("-m", *OVERRIDES, "seed=1,2", "hydra.sweep.dir=place/sweep")
    assert code in (2, 74) and "place/sweep" in out and "Traceback" not in out
    assert "nowhere/base.gguf" not in out


@pytest.mark.parametrize("path", ["file", "file/run", "file/deep/run", "dangling"])
def test_a_file_in_place_of_the_directory_or_above_it_is_reported(cli, path):
    (cli.folder / "file").write_text("precious")
    (cli.folder / "dangling").symlink_to("nothing")
    out = cli(*OVERRIDES, f"hydra.run.dir={path}", expect=74)
    assert_reported(74, out, path)
    assert (cli.folder / "file").read_text() == "precious" and not (cli.folder / "nothing").exists()


def test_a_file_in_place_of_the_checkpoints_is_reported_for_a_new_run(cli):
    (cli.folder / "run").mkdir()
    (cli.folder / "run/saved").write_text("precious")
    out = cli(*OVERRIDES, "hydra.run.dir=run", "checkpoint.dir=saved", expect=74)
    assert_reported(74, out, "run/saved")
    assert (cli.folder / "run/saved").read_text() == "precious"


@pytest.mark.slow
def test_a_file_in_place_of_the_checkpoints_is_reported_for_a_resume(cli, stopped, contents):
    (stopped / "checkpoints").rename(cli.folder / "moved")
    (stopped / "checkpoints").write_text("precious")
    before = contents(stopped, but=(".lock",))
    out = cli("resume=run", OVERRIDES[0], expect=74)
    assert_reported(74, out, "run/checkpoints")
    assert contents(stopped, but=(".lock",)) == before


@pytest.mark.parametrize("name", ["config.yaml", "status.json", "metrics.jsonl", "adapters", "Adapters", "run.log"])
def test_the_checkpoints_folder_cannot_have_the_name_of_another_file_of_the_run(cli, name):
    out = cli(*OVERRIDES, "hydra.run.dir=run", f"checkpoint.dir={name}", expect=2)
    assert f"checkpoint.dir={name} is invalid" in out and not (cli.folder / "run").exists()
