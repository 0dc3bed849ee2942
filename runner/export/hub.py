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
from collections.abc import Iterator, Sequence
from pathlib import Path

from runner.common.errors import ConfigError
from runner.common.filesystem import FileSystem
from runner.common.layout import ADAPTER_CONFIG, ADAPTERS
from runner.config import validation
from runner.export.job import ExportJob, Target
from runner.export.model_card import CardFacts, base_id, base_licence, write_card
from runner.export.model_folder import FusedTarget, MlxTarget
from runner.export.proof import Comparison, ExportError, Measured, Verdict

_LOCAL_KEYS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
"""Keys that transformers fills with the folder that a model was loaded from."""
_TEXTS = ("README.md", "config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json")
_LARGEST_TEXT = 1 << 26


class HubTarget(Target):
    """`--to hub`; `path` is the name that the folder will have."""

    def __init__(
        self,
        path: Path,
        *,
        dequantize: bool,
        adapter_only: bool,
        base: str | None,
        licence: str | None,
        step: int | None,
    ) -> None:
        self._target = MlxTarget() if adapter_only else FusedTarget(path, dequantize=dequantize)
        self._adapter_only, self._typed_base, self._typed_licence, self._step = adapter_only, base, licence, step
        self._facts: CardFacts | None = None
        self._split: str | None = None
        self.limit = self._target.limit

    def write(self, job: ExportJob, path: Path) -> None:
        """Write the files but the card. Raises ConfigError where an adapter's base model has no name."""
        assert job.adapted is not None
        base = job.adapted.base
        name = base_id(job.config, self._typed_base)
        if self._adapter_only and name is None:
            raise ConfigError(
                f"--adapter-only: {job.config.model.path} is no name on the hub by which others could load the base "
                "model. Name it: --base-model ORGANISATION/NAME."
            )
        licence = base_licence(job.config, base.folder, self._typed_licence)
        if licence is None:
            job.log("the base model's licence is not known here: --license ID, or write it into README.md")
        model_type = str(base.config.get("model_type"))
        self._facts = CardFacts(name, licence, model_type, self._step, self._adapter_only, None, None)
        if self._adapter_only:
            adapter_config = json.loads(job.files[ADAPTER_CONFIG]) | {"model": name}
            job.files = {ADAPTERS: job.files[ADAPTERS], ADAPTER_CONFIG: json.dumps(adapter_config, indent=1).encode()}
        self._target.write(job, path)
        for file in path.glob("*.json"):
            _remove_local_names(file)

    def measure(self, job: ExportJob, path: Path, comparison: Comparison) -> Measured:
        """Load the folder as the fused model or the adapter that it is."""
        self._split = comparison.split
        return self._target.measure(job, path, comparison)

    def finish(self, job: ExportJob, verdict: Verdict | None, path: Path) -> None:
        """Write the card, then refuse the folder if a text in it names this machine or holds a secret."""
        assert self._facts is not None
        facts = CardFacts(**{**vars(self._facts), "verdict": verdict, "split": self._split})
        FileSystem().write_file(path / "README.md", write_card(job.config, facts).encode())
        paths = [name for name in (job.config.model.path, job.config.data.path) if Path(name).is_absolute()]
        if found := next(find_personal(path, paths), None):
            raise ExportError(f"Nothing was exported: {found}. Remove it at its source, or export with --to fused.")


def find_personal(folder: Path, paths: Sequence[str] = ()) -> Iterator[str]:
    """Yield what in the texts of `folder` names this machine, its user or one of `paths`, or looks like a secret."""
    home, user, host = os.path.expanduser("~"), _user_name(), socket.gethostname()
    patterns = {
        "a path of this machine": "|".join(map(re.escape, [str(folder.parent), *paths])),
        "the home directory": rf"{re.escape(home)}(?=[/\"'\s])" if len(home) > 2 else None,
        "the user's directory": rf"/(?:home|Users)/{re.escape(user)}\b" if user else None,
        "the name of this machine": rf"(?<![\w-]){re.escape(host)}(?![\w-])" if len(host) > 3 else None,
    }
    for name in _TEXTS:
        if not (folder / name).is_file():
            continue
        text = FileSystem().read_file(folder / name, _LARGEST_TEXT).decode(errors="replace")
        for what, pattern in patterns.items():
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
    """Remove the keys of a JSON file that name the folder that a model was loaded from."""
    if file.name not in _TEXTS:
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(values, dict) and values.keys() & set(_LOCAL_KEYS):
        kept = {key: value for key, value in values.items() if key not in _LOCAL_KEYS}
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
