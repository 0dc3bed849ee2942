"""The backup on a second disk: mirrored, caught up, never in the way, and a run goes on from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.checkpoints import mirror as backup
from runner.checkpoints.store import CheckpointStore
from runner.common.errors import CheckpointError, ConfigError, DirectoryInUse, StorageError
from runner.common.filesystem import FileSystem
from runner.runs.directory import RunDirectory

# Dropout and a schedule, so that a wrong state would show; the best one is not the last one kept.
HARD = {
    "lora.dropout": 0.2,
    "schedule.name": "cosine",
    "train.iters": 20,
    "train.eval_every": 5,
    "checkpoint.every": 3,
    "checkpoint.keep_last": 2,
    "checkpoint.keep_every": 9,
}


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def only(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def backup_disk(tmp_path: Path) -> Path:
    found = tmp_path / "second disk"
    found.mkdir()
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(shared, tiny, train) -> Path:
    return shared / "run" if (shared / "run").exists() else train(tiny(**HARD), shared / "run")


def test_the_selected_checkpoints_and_files_are_mirrored_byte_for_byte_and_no_others(
    tiny, train, tmp_path, backup_disk
):
    run = train(tiny(**HARD, **{"checkpoint.backup": str(backup_disk)}), tmp_path / "run")
    mirror = only(backup_disk)
    best = json.loads((run / "status.json").read_text())["best"]["step"]
    assert steps(mirror) == sorted({9, 18, 20, best})
    for step in steps(mirror):
        name = f"checkpoints/step-{step:07d}"
        assert files(mirror / name) == files(run / name)
    for name in ("config.yaml", "status.json", "metrics.jsonl"):
        assert (mirror / name).read_bytes() == (run / name).read_bytes(), name
    assert files(mirror / "adapters") == files(run / "adapters")
    assert json.loads((mirror / "backup.json").read_text())["run"] == str(run)


def test_a_backup_does_not_change_the_run(tiny, train, tmp_path, backup_disk, whole, assert_equal_runs):
    assert_equal_runs(whole, train(tiny(**HARD, **{"checkpoint.backup": str(backup_disk)}), tmp_path / "run"))


@pytest.mark.slow
def test_a_run_whose_directory_is_lost_resumes_from_its_backup_equal(cli, backup_disk, assert_equal_runs, tmp_path):
    words = ["model=tiny", "data=tiny", "schedule=cosine", "lora.dropout=0.2", "train.iters=20", "train.eval_every=5"]
    words += ["checkpoint.every=3", "checkpoint.keep_every=9"]
    cli(*words, "hydra.run.dir=whole")
    cli(*words, f"checkpoint.backup={backup_disk}", "train.stop_at=10", "hydra.run.dir=run")
    mirror = only(backup_disk)
    assert steps(mirror)[-1] == 10
    shutil.rmtree(cli.folder / "run")
    before = files(mirror)
    out = cli(f"resume={mirror}", "hydra.run.dir=again", "train.stop_at=10")
    assert f"restored {mirror}" in out and "at step 10" in out
    assert {k: v for k, v in files(mirror).items() if k.startswith("checkpoints/")} == {
        k: v for k, v in before.items() if k.startswith("checkpoints/")
    }
    cli("resume=again")
    assert_equal_runs(cli.folder / "whole", cli.folder / "again")
    assert only(backup_disk) == mirror, "the restored run is the same run and keeps its backup"
    assert steps(mirror)[-1] == 20
    # Without a named directory it gets one made of the time, and a finished run is restored whole.
    shutil.rmtree(cli.folder / "again")
    out = cli(f"resume={mirror}")
    assert "is finished" in out
    assert_equal_runs(cli.folder / "whole", next((cli.folder / "outputs").glob("*/*")))


def test_a_missing_backup_disk_warns_once_and_the_backup_catches_up(tiny, train, tmp_path, whole, assert_equal_runs):
    backup_disk = tmp_path / "stick"
    settings = HARD | {"checkpoint.backup": str(backup_disk)}
    run = train(tiny(**settings), tmp_path / "run", stop_at=11)
    log = (run / "run.log").read_text()
    assert log.count(f"{backup_disk}: there is no such folder; is its disk mounted?") == 2, "at first, and at the end"
    assert not backup_disk.exists(), "a folder must not take the place of a disk that is not mounted"
    backup_disk.mkdir()
    train(tiny(**settings), run, resume=run)
    assert "mirrored to" in (run / "run.log").read_text()
    assert steps(only(backup_disk))[-1] == 20
    assert_equal_runs(whole, run)


def test_a_resume_of_a_finished_run_completes_its_backup_without_training(tiny, train, tmp_path, capsys):
    backup_disk = tmp_path / "stick"
    settings = tiny(**HARD, **{"checkpoint.backup": str(backup_disk)})
    run = train(settings, tmp_path / "run")
    assert "the backup is incomplete (" in (run / "run.log").read_text()
    backup_disk.mkdir()
    before = (run / "metrics.jsonl").read_bytes()
    train(settings, run, resume=run)
    assert f"mirrored to {only(backup_disk)}" in capsys.readouterr().out
    assert steps(only(backup_disk))[-1] == 20 and files(only(backup_disk) / "adapters") == files(run / "adapters")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_backup_catches_up_when_its_disk_returns_during_the_run(tmp_path):
    run, backup_disk = tmp_path / "run", tmp_path / "stick"
    run.mkdir()
    store = CheckpointStore(run / "checkpoints", "0123456789abcdef")
    mirror = backup.BackupMirror(backup_disk, RunDirectory(run), store, lambda: [c.step for c in store.checkpoints()])
    store.commit(1, {"a": b"1"})
    mirror.wake()
    wait_until(lambda: mirror.problem is not None)
    assert "each save tries again" in mirror.new_messages()[0]
    store.commit(2, {"a": b"2"})
    mirror.wake()
    backup_disk.mkdir()
    store.commit(3, {"a": b"3"})
    assert mirror.finish(lambda: True)
    assert mirror.new_messages() == [f"backup: caught up in {only(backup_disk)}"]
    assert steps(only(backup_disk)) == [1, 2, 3]


def wait_until(true, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs in a namespace of its own")
def test_a_full_backup_disk_warns_and_training_continues(cli, backup_disk, assert_equal_runs):
    words = ["model=tiny", "data=tiny", "train.iters=20", "train.eval_every=5", "checkpoint.every=3"]
    cli(*words, "hydra.run.dir=whole")
    command = [
        *("unshare", "--mount", "--map-root-user", "--user", "sh", "-c"),
        f'mount -t tmpfs -o size=300k tmpfs "{backup_disk}" && exec "$@"',
        *("sh", sys.executable, "-m", "runner", *words, f"checkpoint.backup={backup_disk}", "hydra.run.dir=run"),
    ]
    done = subprocess.run(command, cwd=cli.folder, env=cli.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backup: step" in done.stdout and "needs" in done.stdout and "has" in done.stdout
    assert done.stdout.count("Training continues") == 1
    assert_equal_runs(cli.folder / "whole", cli.folder / "run")


def test_a_damaged_checkpoint_in_a_backup_is_replaced(tiny, train, tmp_path, backup_disk):
    settings = HARD | {"checkpoint.backup": str(backup_disk)}
    run = train(tiny(**settings), tmp_path / "run", stop_at=11)
    damaged = only(backup_disk) / "checkpoints/step-0000009/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0\1")
    train(tiny(**settings), run, resume=run)
    assert files(only(backup_disk) / "checkpoints/step-0000009") == files(run / "checkpoints/step-0000009")


def test_the_damaged_checkpoints_of_a_backup_are_left_out_and_named(tiny, train, tmp_path, backup_disk):
    train(tiny(**HARD, **{"checkpoint.backup": str(backup_disk)}), tmp_path / "run")
    mirror = only(backup_disk)
    last = mirror / "checkpoints/step-0000020"
    (last / "train_state.json").write_bytes(b"{}")
    directory = RunDirectory(tmp_path / "again")
    directory.claim()
    messages = backup.restore(mirror, directory)
    assert len(messages) == 1 and "step-0000020/train_state.json" in messages[0]
    assert steps(tmp_path / "again") == steps(mirror)[:-1]
    for step in steps(mirror):
        (mirror / f"checkpoints/step-{step:07d}/adapters.safetensors").write_bytes(b"")
    empty = RunDirectory(tmp_path / "third")
    empty.claim()
    with pytest.raises(CheckpointError, match="no valid checkpoint to resume from"):
        backup.restore(mirror, empty)
    empty.abandon()
    assert not (tmp_path / "third").exists()


def test_a_backup_that_a_run_is_writing_is_not_restored(tiny, train, tmp_path, backup_disk):
    train(tiny(**HARD, **{"checkpoint.backup": str(backup_disk)}), tmp_path / "run")
    holder = RunDirectory(only(backup_disk))
    holder.lock()
    directory = RunDirectory(tmp_path / "again")
    directory.claim()
    with pytest.raises(DirectoryInUse, match="pid"):
        backup.restore(only(backup_disk), directory)
    holder.unlock()


def test_a_run_without_a_valid_checkpoint_is_refused_with_the_command_to_resume_its_backup(
    tiny, train, tmp_path, backup_disk
):
    settings = HARD | {"checkpoint.backup": str(backup_disk)}
    run = train(tiny(**settings), tmp_path / "run", stop_at=11)
    for path in (run / "checkpoints").glob("step-*/train_state.json"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="To resume from its backup: python -m runner resume="):
        train(tiny(**settings), run, resume=run)


def test_a_backup_of_an_unknown_schema_is_refused(tmp_path):
    (tmp_path / "backup.json").write_text('{"schema": 2, "run_id": "x"}')
    with pytest.raises(ConfigError, match=r"backup.json cannot be understood: schema 2"):
        backup.restore(tmp_path, RunDirectory(tmp_path / "again"))


def test_a_run_cannot_be_its_own_backup(tmp_path):
    run = tmp_path / "a-run-01234567"
    run.mkdir()
    store = CheckpointStore(run / "checkpoints", "0123456789abcdef")
    (run / "backup.json").write_text(json.dumps({"schema": 1, "run_id": store.run_id}))
    mirror = backup.BackupMirror(tmp_path, RunDirectory(run), store, lambda: [])
    assert not mirror.finish(lambda: True)
    assert "cannot be its backup" in str(mirror.problem)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("what nobody thought of")], ids=repr)
def test_any_failure_of_the_backup_disk_is_reported_and_the_run_does_not_wait(tmp_path, error):
    class Failing(FileSystem):
        def mkdir(self, folder: Path) -> None:
            raise error

    run, backup_disk = tmp_path / "run", tmp_path / "stick"
    run.mkdir()
    backup_disk.mkdir()
    store = CheckpointStore(run / "checkpoints", "0123456789abcdef")
    store.commit(1, {"a": b"1"})
    mirror = backup.BackupMirror(backup_disk, RunDirectory(run), store, lambda: [1], Failing())
    end = time.monotonic() + 20
    assert not mirror.finish(lambda: time.monotonic() < end)
    assert time.monotonic() < end
    assert str(error.args[-1]) in str(mirror.problem)


def test_drafts_of_a_killed_process_are_removed_from_a_backup(tmp_path):
    for name in ("metrics.jsonl", "samples.jsonl", "row_losses.jsonl", "backup.json", "config.yaml", "status.json"):
        (tmp_path / f".{name}.0123abcd.tmp").write_text("half")
    RunDirectory(tmp_path).lock()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_kill_at_any_moment_of_mirroring_leaves_a_backup_that_restores(tmp_path):
    """Each call of the disk in turn is the last one; then the next process catches up."""

    class Dying(FileSystem):
        left = 0

        def __getattribute__(self, name: str) -> object:
            found = object.__getattribute__(self, name)
            if name == "left" or not callable(found) or name.startswith("__"):
                return found
            self.left -= 1
            if self.left < 0:
                raise StorageError("gone")
            return found

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    store = CheckpointStore(run / "checkpoints", "0123456789abcdef")
    for step in (10, 20):
        store.commit(step, {"adapters.safetensors": b"x" * 1000, "train_state.json": b"%d" % step})
    for calls in range(200):
        backup_disk = tmp_path / f"backup_disk-{calls}"
        backup_disk.mkdir()
        disk = Dying()
        disk.left = calls
        first = backup.BackupMirror(backup_disk, RunDirectory(run), store, lambda: [10, 20], disk)
        done = first.finish(lambda: True)
        again = backup.BackupMirror(backup_disk, RunDirectory(run), store, lambda: [10, 20])
        assert again.finish(lambda: True)
        directory = RunDirectory(tmp_path / f"again-{calls}")
        directory.claim()
        assert backup.restore(only(backup_disk), directory) == []
        assert steps(directory.path) == [10, 20]
        directory.unlock()
        if done:
            break
    assert 10 < calls < 199
