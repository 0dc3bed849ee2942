"""`--to hub`: a folder with a model card that `hf upload` takes as it is. Nothing is uploaded here.

The folder holds a fused model, or the adapter alone where its base model has a name on the hub. Names of files and
folders of this machine are taken out, and a last look over all texts refuses what is left of them.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.common.errors import ConfigError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS
from runner.config import schema, serialize, validation
from runner.config.schema import Config
from runner.export.fidelity import ExportError, FidelityCheck, FidelityRows, Measured
from runner.export.model_card import CardFacts, base_id, base_licence, write_card
from runner.export.model_folder import FusedTarget, MlxTarget
from runner.export.target import Target
from runner.export.trained_adapter import TrainedAdapter
from runner.runs.rows import count_or_none

_LOCAL_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
"""Keys that transformers fills with the folder that a model was loaded from."""
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
"""Files of so many words and pieces of words that a machine or a directory may have the name of one of them."""
_LARGEST_TEXT = 1 << 28


class HubTarget(Target):
    """`--to hub`; `path` is the name that the folder will have, and `status` the content of the run's status.json."""

    def __init__(
        self,
        path: Path,
        *,
        dequantize: bool,
        adapter_only: bool,
        base: str | None,
        licence: str | None,
        step: int | None,
        status: Mapping[str, Any] | None = None,
    ) -> None:
        self._target = MlxTarget() if adapter_only else FusedTarget(path, dequantize=dequantize)
        self._adapter_only, self._typed_base, self._typed_licence, self._step = adapter_only, base, licence, step
        self._status = status or {}
        self._facts: CardFacts | None = None
        self._split: str | None = None
        self.limit = self._target.limit

    def write(self, trained: TrainedAdapter, path: Path) -> None:
        """Write the files but the card. Raises ConfigError where an adapter's base model has no name."""
        assert trained.adapted is not None
        base = trained.adapted.base
        name = base_id(trained.config, self._typed_base)
        if self._adapter_only and name is None:
            raise ConfigError(
                f"--adapter-only: {trained.config.model.path} is no name on the hub by which others could load the "
                "base model. Name it: --base-model ORGANISATION/NAME."
            )
        licence = base_licence(trained.config, base.folder, self._typed_licence)
        if licence is None:
            trained.log("the base model's licence is not known here: --license ID, or write it into README.md")
        model_type = str(base.config.get("model_type"))
        rows, tokens = (count_or_none(self._status.get(name)) for name in ("train_rows", "train_tokens"))
        self._facts = CardFacts(name, licence, model_type, self._step, self._adapter_only, None, None, rows, tokens)
        if self._adapter_only:
            adapter_config = json.loads(trained.files[ADAPTER_CONFIG]) | {"model": name}
            trained.files = {
                ADAPTERS: trained.files[ADAPTERS],
                ADAPTER_CONFIG: json.dumps(adapter_config, indent=1).encode(),
            }
        self._target.write(trained, path)
        self.limit = self._target.limit
        for file in path.rglob("*.json"):
            if file.name not in _VOCABULARIES:
                _remove_local_names(file)

    def measure(self, trained: TrainedAdapter, path: Path, rows: FidelityRows) -> Measured:
        """Load the folder as the fused model or the adapter that it is."""
        self._split = rows.split
        return self._target.measure(trained, path, rows)

    def finish(self, trained: TrainedAdapter, check: FidelityCheck | None, path: Path) -> None:
        """Write the card, then refuse the folder if a text in it names this machine or holds a secret."""
        assert self._facts is not None
        facts = CardFacts(**{**vars(self._facts), "check": check, "split": self._split})
        FileSystem().write_file(path / "README.md", write_card(trained.config, facts).encode())
        if found := next(find_personal(path, local_paths(trained.config)), None):
            raise ExportError(f"Nothing was exported: {found}. Remove it at its source, or export with --to fused.")


def local_paths(config: Config) -> list[str]:
    """Return the paths of files and folders of this machine in the settings, also those of the parts of a mixture."""
    settings = serialize.flatten(config)
    values = [settings.get(name) for name in schema.path_settings()]
    values += [part.get("path") for part in config.data.mix or []]
    paths = [value for value in values if isinstance(value, str) and "/" in value.strip("/")]
    return [
        path for path in paths if Path(path).expanduser().is_absolute() or Path(path).exists()
    ]  # no name on the hub


def find_personal(folder: Path, paths: Sequence[str] = ()) -> Iterator[str]:
    """Yield what in the texts of `folder` names this machine, its user or one of `paths`, or looks like a secret.

    Every file is a text but those of weights.
    """
    home, user, host = os.path.expanduser("~"), _user_name(), socket.gethostname()
    parents = {str(folder.parent), str(folder.parent.resolve())}
    found = "|".join(re.escape(path.rstrip("/")) for path in sorted(parents | set(paths)) if len(path) > 1)
    patterns = {
        "a path of this machine": rf"(?<![\w.-])(?:{found})(?![\w-])" if found else None,
        "the home directory": rf"{re.escape(home)}/\w" if len(home) > 2 else None,
        "the user's directory": rf"/(?:home|Users)/{re.escape(user)}\b" if user else None,
    }
    names = {
        "the home directory": rf"{re.escape(home)}(?=[/\"'\s])" if len(home) > 2 else None,
        "the name of this machine": rf"(?<![\w-]){re.escape(host)}(?![\w-])" if len(host) > 3 else None,
    }
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        name = file.relative_to(folder).as_posix()
        text = FileSystem().read_file(file, _LARGEST_TEXT).decode(errors="replace")
        for what, pattern in (patterns if file.name in _VOCABULARIES else patterns | names).items():
            if pattern and re.search(pattern, text):
                yield f"{name} holds {what}"
        if list(validation.secrets_in({"": text})) or list(validation.secrets_in(dict(enumerate(text.split())))):
            yield f"{name} holds what looks like a secret"


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user need not have a name
        return ""


def _remove_local_names(file: Path) -> None:
    """Remove the keys of a JSON file, at any depth, that name the folder that a model was loaded from."""
    values = json.loads(file.read_text(encoding="utf-8"))
    kept = _without_local_names(values)
    if kept != values:
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_local_names(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_local_names(value) for key, value in values.items() if key not in _LOCAL_KEYS}
    return [_without_local_names(value) for value in values] if isinstance(values, list) else values
