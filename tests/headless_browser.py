"""A browser for the tests of pages: one that is installed, or else one from npm, which needs no root.

`python tests/headless_browser.py` says which one the tests use, and fetches one where there is none (Linux on x86-64,
with npm): @sparticuz/chromium, a Chromium that brings what it needs but the C library. Playwright drives it, and
downloads no browser of its own.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

PACKAGE = "@sparticuz/chromium@153.0.0"
INTEGRITY = "sha512-jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA=="
"""Of the package's archive, as npm states it."""
NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chrome", "chromium-browser")
APPLICATIONS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
FETCHED = Path(sys.prefix) / "share" / "headless-browser"


class Browser(NamedTuple):
    """A Chromium, and the environment variables that it needs."""

    executable: str
    environment: dict[str, str]


def find() -> Browser | None:
    """The browser of the variable RUNNER_BROWSER, one that is installed, or the fetched one."""
    candidates = [os.environ.get("RUNNER_BROWSER"), *map(shutil.which, NAMES), *APPLICATIONS]
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return Browser(path, {})
    if (FETCHED / "chromium").is_file():
        libraries = [str(FETCHED / "al2023" / "lib"), str(FETCHED / "swiftshader")]
        return Browser(str(FETCHED / "chromium"), {"LD_LIBRARY_PATH": ":".join(libraries)})
    return None


def fetch() -> None:
    """Fetch the browser from npm into the environment of this Python."""
    import brotli

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(folder).glob("*.tgz")
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if f"sha512-{digest}" != INTEGRITY:
            raise OSError(f"{PACKAGE} is not the archive that is known here: its SHA-512 differs")
        with tarfile.open(archive) as package:
            package.extractall(folder, filter="data")
        packed = Path(folder) / "package" / "bin"
        for name in ("al2023", "swiftshader"):
            content = brotli.decompress((packed / f"{name}.tar.br").read_bytes())
            with tarfile.open(fileobj=io.BytesIO(content)) as files:
                files.extractall(FETCHED / name, filter="data")
        executable = FETCHED / "chromium.part"
        executable.write_bytes(brotli.decompress((packed / "chromium.br").read_bytes()))
        executable.chmod(0o755)
        executable.rename(FETCHED / "chromium")


def main() -> None:
    """Print which browser the tests use; fetch one where there is none."""
    if find() is None and (platform.system(), platform.machine()) == ("Linux", "x86_64") and shutil.which("npm"):
        try:
            fetch()
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            print(f"setup: no browser could be fetched from npm: {error}", file=sys.stderr)
    found = find()
    print(f"setup: browser for the tests of pages: {found.executable if found else 'none; these tests are skipped'}")


if __name__ == "__main__":
    main()
