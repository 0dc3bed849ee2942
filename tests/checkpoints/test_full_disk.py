"""Saves on a disk that is really full, under a real limit, or not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runner.checkpoints.store import CheckpointStore
from runner.common.errors import RunnerError

ROOT = Path(__file__).parents[2]


_SAVE = """
import sys
from pathlib import Path
from runner.common.filesystem import FileSystem as Disk
from runner.checkpoints.store import CheckpointStore as Store
from runner.common.errors import StorageError

class Blind(Disk):
    def free_space(self, folder):
        return sys.maxsize

folder, disk = Path(sys.argv[1]), Blind() if "blind" in sys.argv else Disk()
files = {name: bytes(200_000) for name in "abc"}
store = Store(folder / "checkpoints", "run-1", disk)
def save(step, files):
    try:
        store.commit(step, files)
        print("saved")
    except StorageError as error:
        print(error.exit_code, error)
save(1, {"a": b"small"})
"""


def _run(program: str, *arguments: str, before: list[str] | None = None) -> list[str]:
    command = [*(before or []), sys.executable, "-c", _SAVE + program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if before and done.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_file_size_limit_of_the_process_is_a_storage_error(tmp_path: Path) -> None:
    program = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save(2, files)
loaded, problems = store.newest_valid()
print(loaded.checkpoint.step, problems)
"""
    first, second, third = _run(program, str(tmp_path))
    assert first == "saved"
    assert second.startswith("74 step 2 was not saved")
    assert "EFBIG" in second
    assert third == "1 []"


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs in a namespace of its own")
@pytest.mark.parametrize("blind", ["", "blind"], ids=["asked before", "found while writing"])
def test_a_full_disk_is_a_storage_error_at_each_file_and_the_old_checkpoint_stays(tmp_path: Path, blind: str) -> None:
    program = """
for room in (0, 100_000, 300_000, 500_000, 700_000):
    (folder / "filler").write_bytes(b"")
    free = store._filesystem.__class__.__mro__[-2]().free_space(folder)
    (folder / "filler").write_bytes(bytes(free - room))
    save(2, files)
    loaded, problems = store.newest_valid()
    print(loaded.checkpoint.step, problems, sorted(path.name for path in store.folder.iterdir()))
"""
    mount = ["unshare", "--mount", "--map-root-user", "--user", "sh", "-c"]
    mount.append(f'mount -t tmpfs -o size=2m tmpfs "{tmp_path}" && exec "$@"')
    first, *rest = _run(program, str(tmp_path), blind, before=[*mount, "sh"])
    assert first == "saved"
    for full, after in zip(rest[:-2:2], rest[1:-2:2], strict=True):
        assert full.startswith("74 step 2 was not saved")
        assert "needs " in full
        assert ", has " in full
        assert "ENOSPC" in full or not blind
        assert after == "1 [] ['step-0000001']"
    assert rest[-2:] == ["saved", "2 [] ['step-0000001', 'step-0000002']"]


def test_no_failure_is_a_bare_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = CheckpointStore(tmp_path / "file" / "checkpoints", "run-1")
    with pytest.raises(RunnerError, match="Not a directory"):
        store.commit(1, {"a": b"1"})
