"""How packages of the operating system are installed, by the package manager that this machine has."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

INSTALL = {
    "apt-get": "apt-get install",
    "dnf": "dnf install",
    "zypper": "zypper install",
    "pacman": "pacman -S",
}
"""By the program of the package manager."""


def install_hint(packages: Mapping[str, str]) -> str:
    """Return ``" (apt-get install gcc)"``, the command for the first package manager of this machine that is a key of
    `packages`, to follow an advice; empty where there is none."""
    for manager, package in packages.items():
        if shutil.which(manager):
            return f" ({INSTALL[manager]} {package})"
    return ""
