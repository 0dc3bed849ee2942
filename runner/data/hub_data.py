"""Data sets of the Hugging Face Hub: JSON files as they are, everything else through the library `datasets`."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from runner.common.cache_dir import cache_dir
from runner.common.errors import DataError
from runner.common.text import first_line

INSTALL = "pip install 'mlx-runner[hub]'"


def has_datasets_library() -> bool:
    """Return whether the library `datasets` is installed."""
    return importlib.util.find_spec("datasets") is not None


def download_json(name: str, revision: str | None, *, required: bool) -> Path | None:
    """Return the folder of the JSON files of the hub data set `name`; None where it cannot be had and is not required.

    Raises:
        DataError: there is no such data set, or it cannot be downloaded.
    """
    # huggingface_hub takes part of a second to import, and a local folder does not need it.
    from huggingface_hub import errors, snapshot_download

    missing = f"'{name}' is not a local folder, and the Hub data set of that name"
    patterns = ["*.jsonl", "*.json"]
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
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
        if not required:
            return None
        raise DataError(
            f"{missing} is neither cached nor reachable. Connect once (without HF_HUB_OFFLINE), or name a local folder."
        ) from error
    except (errors.HFValidationError, errors.HfHubHTTPError, OSError) as error:
        raise DataError(f"{missing} cannot be downloaded: {error}") from error


def split_files(
    name: str,
    config: str | None,
    revision: str | None,
    splits: Mapping[str, str],
    usual_names: Mapping[str, Sequence[str]],
) -> dict[str, tuple[Path, ...]]:
    """Return the splits of the hub data set as Parquet files in the cache folder.

    `splits` are names or slices of splits (``train[:90%]``); the others are taken by their usual names.

    Raises:
        DataError: `datasets` is not installed, or cannot load the data set, its configuration or a split.
    """
    if not has_datasets_library():
        raise DataError(f"{name} is read with the library datasets, which is not installed: {INSTALL}")
    import datasets

    datasets.disable_progress_bars()
    location = _location(name, config, revision)
    arguments: dict[str, Any] = {"path": location, "name": config}
    if location == name:
        arguments["revision"] = revision
    files: dict[str, tuple[Path, ...]] = {}
    try:
        available = datasets.load_dataset(**arguments)
        for split, names in usual_names.items():
            usual = next((usual for usual in names if usual in available), None)
            if split in splits:
                plain = splits[split] in available
                rows = available[splits[split]] if plain else datasets.load_dataset(**arguments, split=splits[split])
            elif usual is not None:
                rows = available[usual]
            else:
                continue
            files[split] = (_write_parquet(rows, name, config, splits.get(split) or str(usual)),)
    except DataError:
        raise
    except Exception as error:  # the library, and what it calls, raise all kinds of errors
        raise DataError(f"data.path={name} cannot be loaded from the hub: {_reason(error)}") from error
    if not files:
        raise DataError(
            f"{name} has the splits {', '.join(map(str, available))}, none of the usual names: data.splits.train=NAME."
        )
    return files


def _location(name: str, config: str | None, revision: str | None) -> str:
    """Return `name`, or offline the folder of its snapshot in the hub's cache, which `datasets` reads as a local one.

    Offline, `datasets` itself only finds what it has prepared before.
    """
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        with suppress(Exception):
            return str(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    return name


def _write_parquet(rows: Any, name: str, config: str | None, split: str) -> Path:
    """Return the rows of a split as a Parquet file in the cache folder, written unless it is there already."""
    described = json.dumps([name, config, split, rows._fingerprint, len(rows)])
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    folder = cache_dir() / "hub_data" / name.replace("/", "--")
    file = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', split).strip('-')}-{key}.parquet"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".tmp")
        rows.to_parquet(str(draft))
        draft.replace(file)
    return file


def _reason(error: Exception) -> str:
    return first_line(str(error))[:400] or type(error).__name__
