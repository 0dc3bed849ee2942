"""Locating a data set: a local folder, a built-in set, or a data set of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from runner.common.errors import DataError, did_you_mean

SPLIT_FILE_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
"""Accepted file names (without .jsonl) of each split, in order of preference."""
SPLITS = tuple(SPLIT_FILE_NAMES)
BUILTIN_PREFIX = "builtin:"
BUILTIN_SETS = Path(__file__).parent / "sets"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
EXPECTED_FILES = "A data set is a folder with train.jsonl and, optionally, valid.jsonl and test.jsonl."


def find_dataset(path: str) -> Path:
    """Return the folder that a value of `data.path` names.

    Tried in this order: an existing folder; ``builtin:NAME``; a Hub id ``org/name``, of which only the JSON files are
    downloaded (offline, they are taken from the Hub's cache).

    Raises:
        DataError: there is no such folder, built-in set or Hub data set.
    """
    if path.startswith(BUILTIN_PREFIX):
        return _find_builtin(path.removeprefix(BUILTIN_PREFIX))
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if path and folder.exists():
        raise DataError(f"{path} is a file. {EXPECTED_FILES} Name the folder: data.path={folder.parent}")
    if HUB_ID.fullmatch(path):
        return _download_from_hub(path)
    raise DataError(
        f"There is no folder '{path}'.{_suggest_folder(folder)} {EXPECTED_FILES} "
        f"Other values of data.path: {BUILTIN_PREFIX}NAME, or a Hub id such as org/name."
    )


def find_split_files(folder: Path) -> dict[str, Path]:
    """Return the file of each split that exists in `folder` or, where it has none, in its ``data/``.

    Raises:
        DataError: there is no split file; the message lists the content of the folder.
    """
    for location in (folder, folder / "data"):
        files = {}
        for split, names in SPLIT_FILE_NAMES.items():
            existing = [file for name in names if (file := location / f"{name}.jsonl").exists()]
            if existing:
                files[split] = existing[0]
        if files:
            return files
    raise DataError(f"{folder} has none of train.jsonl, valid.jsonl, test.jsonl. {describe_content(folder)}")


def describe_content(folder: Path) -> str:
    """Return a sentence that lists `folder`, with a hint where a file has nearly the expected name."""
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        return f"It cannot be listed: {error.strerror}."
    names = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    if not names:
        return "It is empty."
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    hint = ""
    if any(Path(name).stem in ("train", "training") and name != "train.jsonl" for name in names):
        hint = " The file must be named train.jsonl and contain one JSON object per line."
    return f"It contains: {shown}.{hint}"


def _find_builtin(name: str) -> Path:
    known = sorted(
        entry.name for entry in BUILTIN_SETS.iterdir() if entry.is_dir() and not entry.name.startswith(("_", "."))
    )
    if name not in known:
        raise DataError(
            f"There is no built-in data set '{name}'.{did_you_mean(name, known)} "
            f"Built-in data sets: {', '.join(known)}."
        )
    return BUILTIN_SETS / name


def _suggest_folder(folder: Path) -> str:
    """Return a "did you mean" for a missing folder, from the folders beside it."""
    try:
        return did_you_mean(folder.name, [entry.name for entry in folder.parent.iterdir() if entry.is_dir()])
    except OSError:
        return ""


def _download_from_hub(name: str) -> Path:
    # huggingface_hub takes part of a second to import, and a local folder does not need it.
    from huggingface_hub import errors, snapshot_download

    missing = f"'{name}' is not a local folder, and the Hub data set of that name"
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["*.jsonl", "*.json"]))
    except errors.GatedRepoError as error:
        raise DataError(
            f"{missing} is gated: request access on its page, then set HF_TOKEN in the environment."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{missing} does not exist or is private. For a private data set, set HF_TOKEN in the environment; "
            "for a local folder, check the name."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise DataError(
            f"{missing} is neither cached nor reachable. Connect once (without HF_HUB_OFFLINE), or name a local "
            f"folder. {EXPECTED_FILES}"
        ) from error
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise DataError(f"{missing} cannot be downloaded: {error}") from error
