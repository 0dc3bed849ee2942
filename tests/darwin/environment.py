"""A virtual environment of simulated macOS: `python tests/darwin/environment.py FOLDER` makes one.

It borrows the packages and the commands of the environment that makes it, and has a cache of its own, FOLDER/cache,
which shares the small model with the ordinary one: what is cached about a machine is not that of this one.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = "smollm2_135m"


def make_environment(folder: Path) -> Path:
    """Make the environment in `folder` anew, apart from its cache, and return its Python."""
    venv.create(folder, clear=False, symlinks=True, with_pip=False)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    shutil.copy(HERE / "simulated_macos.py", packages)
    # A line of a .pth file that starts with import is executed; the others are added to sys.path.
    lines = ["import simulated_macos; simulated_macos.start()", sysconfig.get_path("purelib"), str(ROOT)]
    (packages / "a_simulated_macos.pth").write_text("".join(f"{line}\n" for line in lines))
    python = folder / "bin" / "python"
    for script in Path(sys.executable).parent.iterdir():
        if script.is_file() and (text := script.read_bytes()).startswith(b"#!%s\n" % os.fsencode(sys.executable)):
            (python.parent / script.name).write_bytes(b"#!%s\n%s" % (os.fsencode(python), text.partition(b"\n")[2]))
            (python.parent / script.name).chmod(0o755)
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    if not (cache / MODEL).exists():
        from runner.common.cache_dir import cache_dir

        (cache / MODEL).symlink_to(cache_dir() / MODEL)
    return python


if __name__ == "__main__":
    print(make_environment(Path(sys.argv[1]).absolute()))
