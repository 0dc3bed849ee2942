"""Locating the files of a data set: a file, a folder, a built-in set, or a data set of the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from runner.common.errors import DataError, did_you_mean
from runner.config.schema import DataConfig, SplitsConfig
from runner.data import hub_data
from runner.data.formats import EncodeOptions
from runner.data.readers import SUFFIXES

SPLIT_FILE_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev", "eval"), "test": ("test",)}
"""Accepted file names (without suffix) of each split, in order of preference."""
SPLITS = tuple(SPLIT_FILE_NAMES)
BUILTIN_PREFIX = "builtin:"
BUILTIN_SETS = Path(__file__).parent / "sets"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
EXPECTED_FILES = (
    "A data set is a file of rows, or a folder with train.jsonl (or .json, .csv, .parquet) and, optionally, valid and "
    "test files."
)
_SHARD = r"-\d+-of-\d+"

SplitFiles = dict[str, tuple[Path, ...]]
"""The files of each split that exists."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set to train on, alone or in a mix."""

    path: str
    options: EncodeOptions
    config: str | None = None
    revision: str | None = None
    splits: SplitsConfig | None = None
    weight: float | None = None

    def find_files(self) -> SplitFiles:
        """Return the files of each split, downloading those of a hub data set. Raises DataError."""
        names = {split: name for split, name in asdict(self.splits or SplitsConfig()).items() if name}
        found = _find_existing(self.path)
        if found is None and HUB_ID.fullmatch(self.path):
            return self._find_at_hub(names)
        folder = found or find_dataset(self.path)
        if folder.is_file():
            if self.config or names:
                raise DataError(f"{folder} is one file: data.config and data.splits are for folders and the hub.")
            return {"train": (folder,)}
        if self.config:
            if not (folder / self.config).is_dir():
                raise DataError(f"{folder} has no folder '{self.config}' (data.config). {describe_content(folder)}")
            folder = folder / self.config
        return find_split_files(folder, names)

    def _find_at_hub(self, names: dict[str, str]) -> SplitFiles:
        if not self.config and not any("[" in name for name in names.values()):
            folder = hub_data.download_json(self.path, self.revision, required=not hub_data.has_datasets_library())
            if folder is not None and (hub_data.has_datasets_library() is False or _has_split_files(folder, names)):
                return find_split_files(folder, names)
        return hub_data.split_files(self.path, self.config, self.revision, names, SPLIT_FILE_NAMES)


def find_dataset(path: str) -> Path:
    """Return the file or folder that a value of `data.path` names.

    Tried in this order: an existing file or folder; ``builtin:NAME``; a Hub id ``org/name``, of which only the JSON
    files are downloaded (offline, they are taken from the Hub's cache).

    Raises:
        DataError: there is no such file, folder, built-in set or Hub data set.
    """
    found = _find_existing(path)
    if found is not None:
        return found
    if HUB_ID.fullmatch(path):
        downloaded = hub_data.download_json(path, None, required=True)
        assert downloaded is not None
        return downloaded
    raise DataError(
        f"There is no file or folder '{path}'.{_suggest_folder(Path(path).expanduser())} {EXPECTED_FILES} "
        f"Other values of data.path: {BUILTIN_PREFIX}NAME, or a Hub id such as org/name."
    )


def _find_existing(path: str) -> Path | None:
    if path.startswith(BUILTIN_PREFIX):
        return _find_builtin(path.removeprefix(BUILTIN_PREFIX))
    found = Path(path).expanduser()
    if not path or not found.exists():
        return None
    if found.is_dir():
        return found
    if found.suffix not in SUFFIXES:
        raise DataError(f"{path} is no data file: its name must end with {', '.join(SUFFIXES)}. {EXPECTED_FILES}")
    return found


def find_split_files(folder: Path, names: dict[str, str] | None = None) -> SplitFiles:
    """Return the files of each split that exists in `folder` or, where it has none, in its ``data/``.

    A split is one file, or shards such as ``train-00000-of-00002.parquet``. `names` are names of splits that differ
    from the usual ones.

    Raises:
        DataError: there is no split file, or none of a name in `names`; the message lists the content of the folder.
    """
    for location in (folder, folder / "data"):
        if files := _split_files_in(location, names or {}):
            for split, name in (names or {}).items():
                if split not in files:
                    raise DataError(f"{location} has no file '{name}' (data.splits). {describe_content(location)}")
            return files
    raise DataError(f"{folder} has none of train.jsonl, valid.jsonl, test.jsonl. {describe_content(folder)}")


def _has_split_files(folder: Path, names: dict[str, str]) -> bool:
    return any(_split_files_in(location, names) for location in (folder, folder / "data"))


def _split_files_in(folder: Path, names: dict[str, str]) -> SplitFiles:
    files: SplitFiles = {}
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for split, usual in SPLIT_FILE_NAMES.items():
        candidates: list[tuple[Path, ...]] = []
        for name in (names[split],) if split in names else usual:
            for suffix in ("",) if name.endswith(SUFFIXES) else SUFFIXES:
                whole = tuple(entry for entry in entries if entry.name == name + suffix)
                shard = re.compile(re.escape(name) + _SHARD + re.escape(suffix))
                shards = tuple(entry for entry in entries if shard.fullmatch(entry.name))
                if shards and not whole:
                    _require_all_shards(folder, name, shards)
                candidates += [found for found in (whole, shards) if found]
        if len(candidates) > 1:
            first, second = candidates[0][0].name, candidates[1][0].name
            raise DataError(
                f"{folder} has {first} and {second}, and only one of them can be the split {split}. Remove one, or "
                f"choose it: data.splits.{split}={first}"
            )
        if candidates:
            files[split] = candidates[0]
    return files


def _require_all_shards(folder: Path, name: str, shards: tuple[Path, ...]) -> None:
    """Raise DataError if the shards of a split are not all of one set."""
    numbers = [tuple(map(int, re.findall(r"\d+", shard.stem.removeprefix(name)))) for shard in shards]
    total = numbers[0][1]
    if sorted(numbers) != [(number, total) for number in range(total)]:
        raise DataError(
            f"{folder}: the files {name}-…-of-… are {len(shards)} and not the {total:,} of one set. "
            "Add the missing ones; data.path may also name a single file."
        )


def find_sources(data: DataConfig, method: str = "sft") -> list[Source]:
    """Return the sources of data.mix, or else the one that data.path names, for `method.name`.

    Raises:
        DataError: data.template cannot be read.
    """
    options = EncodeOptions.from_config(data, method)
    if data.mix is None:
        return [Source(path=data.path, options=options, config=data.config, revision=data.revision, splits=data.splits)]
    return [
        Source(
            path=item["path"],
            options=options.of_source(item.get("format"), item.get("keys") or {}),
            config=item.get("config"),
            revision=item.get("revision"),
            splits=SplitsConfig(**item.get("splits") or {}),
            weight=item.get("weight"),
        )
        for item in data.mix
    ]


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
        hint = f" The file must be named train, with one of {', '.join(SUFFIXES)}."
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
        names = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
        return did_you_mean(
            folder.name, names, cutoff=0.7
        )  # names of folders have less in common than those of settings
    except OSError:
        return ""
