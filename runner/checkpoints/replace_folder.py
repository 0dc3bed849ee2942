"""A folder that is replaced as a whole, such as a run's result: the new one is complete before the old one goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runner.common.filesystem import Content, FileSystem


def replace(target: Path, contents: Mapping[str, Content], disk: FileSystem) -> None:
    """Make the folder `target` hold exactly `contents`. Raises StorageError; the old one is then whole."""
    fresh, old = _aside(target, "new"), _aside(target, "old")
    if disk.look(fresh):
        disk.remove_tree(fresh)
    disk.mkdir(fresh)
    for name, content in contents.items():
        disk.write_file(fresh / name, content)
    disk.fsync_folder(fresh)
    repair(target, disk)
    replaced = disk.look(target) is not None
    if replaced:
        disk.rename(target, old)
    disk.rename(fresh, target)
    disk.fsync_folder(target.parent)
    if replaced:
        disk.remove_tree(old)


def repair(target: Path, disk: FileSystem) -> None:
    """Put `target` back where a crash came between the two renames of `replace`."""
    old = _aside(target, "old")
    there = disk.look(old)
    if there is None or there.kind != "folder":
        return
    if disk.look(target):
        disk.remove_tree(old)
    else:
        disk.rename(old, target)


def _aside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")
