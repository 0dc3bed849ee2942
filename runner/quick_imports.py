"""What transformers finds out about itself at each import is kept in the cache folder.

To learn which class lies in which file, transformers reads its 1,600 model files at every import, and once more
for ``transformers.models``: two thirds of a second of the 1.1 that ``import mlx_lm`` takes. What it finds depends
on its own files alone, so it is kept by the install (version, place, and the time and size of the wheel's RECORD).
An editable install has no such record that tells of an edit, and is read anew each time. Wherever something is
not as expected transformers does its own reading; nothing of it is changed on disk.

What it needs itself is imported when transformers is: many commands never come to that.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.cache import cache_folder

MODULE = "transformers.utils.import_utils"
FUNCTION = "define_import_structure"
Structure = dict[frozenset[str], dict[str, set[str]]]
"""{the libraries needed: {a module below transformers.models: the names it exports}}"""


def install() -> None:
    """Have the next import of transformers use what is kept; without effect where it is imported already."""
    if MODULE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds one module as Python would and hands it a loader that looks into the cache."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        found = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if found is None or type(found.loader) is not importlib.machinery.SourceFileLoader or not found.origin:
            return found
        return importlib.util.spec_from_file_location(fullname, found.origin, loader=_Loader(fullname, found.origin))


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        own = getattr(module, FUNCTION, None)
        if own is not None:
            setattr(module, FUNCTION, remembering(own, Path(module.__file__ or "").parent.parent / "models"))


def remembering(own: Callable[..., Structure], models: Path) -> Callable[..., Structure]:
    """`own` (transformers' define_import_structure), with its answer for the folder `models` kept."""

    def define_import_structure(module_path: Any, prefix: str | None = None) -> Structure:
        folder = Path(module_path)
        if folder not in (models, models / "__init__.py"):
            return own(module_path, prefix)
        file = _file(models)
        found = _read(file) if file else None
        if found is None:
            found = own(module_path)
            if file:
                _write(file, found)
        if prefix is None:
            return found
        return {needs: {f"{prefix}.{name}": names for name, names in of.items()} for needs, of in found.items()}

    return define_import_structure


def _file(models: Path) -> Path | None:
    """Where the answer for this install is kept; None where its files can change without a trace."""
    import hashlib
    import importlib.metadata

    try:
        wheel = importlib.metadata.distribution("transformers")
        record = wheel.locate_file(f"transformers-{wheel.version}.dist-info/RECORD")
        if Path(str(wheel.locate_file("transformers/models"))).resolve() != models.resolve():
            return None
        stat = os.stat(str(record))
        key = repr((str(models.resolve()), wheel.version, stat.st_mtime_ns, stat.st_size, os.stat(models).st_mtime_ns))
        return cache_folder() / "imports" / f"transformers-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    except Exception:
        return None


def _read(file: Path) -> Structure | None:
    import json

    try:
        kept = json.loads(file.read_bytes())
        return {frozenset(needs): {name: set(names) for name, names in of.items()} for needs, of in kept}
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _write(file: Path, found: Structure) -> None:
    import json
    import tempfile

    try:
        kept = [[sorted(needs), {name: sorted(names) for name, names in of.items()}] for needs, of in found.items()]
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w") as out:
                json.dump(kept, out)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    except (OSError, TypeError, ValueError):
        pass
