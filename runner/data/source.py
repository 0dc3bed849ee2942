"""Where a data set lies: a folder, a set that ships with the runner, or a data set of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from runner.common.errors import DataError, did_you_mean

SPLITS = ("train", "valid", "test")
NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
BUILTIN = "builtin:"
SETS = Path(__file__).parent / "sets"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
EXPECTED = "A data set is a folder with train.jsonl and, if wanted, valid.jsonl and test.jsonl."


def resolve(path: str) -> Path:
    """The folder that `data.path` means.

    An existing folder comes first, then ``builtin:NAME``, then a hub id ``org/name``, of which only the JSON
    files are fetched (or found in the hub's cache, offline).

    Raises:
        DataError: nothing is there, or what is there is no data set.
    """
    if path.startswith(BUILTIN):
        return _builtin(path.removeprefix(BUILTIN))
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return folder
    if path and folder.exists():
        raise DataError(f"{path} is a file. {EXPECTED} Give the folder: data.path={folder.parent}")
    if HUB_ID.fullmatch(path):
        return _from_hub(path)
    raise DataError(
        f"There is no folder '{path}'.{_near_folder(folder)} {EXPECTED} "
        f"Other values of data.path: {BUILTIN}NAME, or a hub id such as org/name."
    )


def find_files(folder: Path) -> dict[str, Path]:
    """The file of each split in `folder` (or in its ``data/``), for those of train, valid and test there are.

    Raises:
        DataError: there is none of them; the message lists what is there.
    """
    for place in (folder, folder / "data"):
        found = {}
        for split, names in NAMES.items():
            files = [place / f"{name}.jsonl" for name in names]
            there = [file for file in files if file.exists()]
            if there:
                found[split] = there[0]
        if found:
            return found
    raise DataError(f"{folder} holds none of train.jsonl, valid.jsonl, test.jsonl. {listing(folder)}")


def listing(folder: Path) -> str:
    """What is in `folder`, as a sentence, with a hint where a file has nearly the right name."""
    try:
        entries = list(folder.iterdir())
    except OSError as error:
        return f"It cannot be listed: {error.strerror}."
    names = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    hint = ""
    if any(Path(name).stem in ("train", "training") and name != "train.jsonl" for name in names):
        hint = " The file has to be called train.jsonl and to hold one JSON object a line."
    return (f"It holds: {shown}." if names else "It is empty.") + hint


def _builtin(name: str) -> Path:
    known = sorted(entry.name for entry in SETS.iterdir() if entry.is_dir()) if SETS.is_dir() else []
    known = [entry for entry in known if not entry.startswith(("_", "."))]
    if name not in known:
        raise DataError(
            f"There is no built-in data set '{name}'.{did_you_mean(name, known)} "
            f"There are: {', '.join(known) or 'none'}."
        )
    return SETS / name


def _near_folder(folder: Path) -> str:
    if not folder.parent.is_dir():
        return ""
    try:
        return did_you_mean(folder.name, [entry.name for entry in folder.parent.iterdir() if entry.is_dir()])
    except OSError:
        return ""


def _from_hub(name: str) -> Path:
    # huggingface_hub takes part of a second to import, and a local folder does not need it.
    from huggingface_hub import errors, snapshot_download

    missing = f"'{name}' is no folder here, and as a data set of the hub"
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["*.jsonl", "*.json"]))
    except errors.GatedRepoError as error:
        raise DataError(
            f"{missing} it is gated: ask for access on its page, then set HF_TOKEN in the environment."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{missing} it does not exist or is private. For a private one set HF_TOKEN in the environment; "
            f"for a folder check the name."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise DataError(
            f"{missing} it is neither in the cache nor reachable. Connect once (without HF_HUB_OFFLINE), or "
            f"give a folder. {EXPECTED}"
        ) from error
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise DataError(f"{missing} it cannot be fetched: {error}") from error
