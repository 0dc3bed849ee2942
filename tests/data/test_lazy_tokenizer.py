"""The tokenizer of a folder is loaded only if something has to be tokenized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlx_lm import utils

from runner.common.disk_cache import DiskCache
from runner.common.errors import ModelError
from runner.config import schema
from runner.data.lazy_tokenizer import LazyTokenizer
from runner.data.tokenize import load_dataset
from runner.export.mlx import write_model_folder
from runner.models.load import load_base_model


@pytest.fixture
def model(tmp_path: Path, cache: Path) -> Path:
    write_model_folder(load_base_model(schema.ModelConfig(path="builtin:tiny")), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def loaded_folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose tokenizers were loaded, as a growing list."""
    load_tokenizer, folders = utils.load_tokenizer, []

    def recording(folder: Path, *arguments: object, **options: object) -> object:
        folders.append(Path(folder))
        return load_tokenizer(folder, *arguments, **options)

    monkeypatch.setattr(utils, "load_tokenizer", recording)
    return folders


@pytest.fixture
def tokenize(model: Path, tmp_path: Path, write_rows: Callable, make_options: Callable) -> Callable[[], np.ndarray]:
    """Tokenize two rows as a run does."""
    file = write_rows("train.jsonl", {"text": "swap: red blue"}, {"text": "blue red"})

    def make() -> np.ndarray:
        base = load_base_model(schema.ModelConfig(path=str(model)))
        cache = DiskCache(tmp_path / "tokens", 10**9)
        return load_dataset(
            str(file.parent), base.lazy_tokenizer, make_options(format="text"), ("train",), cache
        ).train.tokens

    return make


def test_cached_tokens_need_no_tokenizer(tokenize: Callable, loaded_folders: list[Path], model: Path) -> None:
    first = np.array(tokenize())
    assert loaded_folders == [model]
    assert tokenize().tobytes() == first.tobytes() and loaded_folders == [model]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "new_file.json", "additional_chat_templates/other.jinja"])
def test_a_changed_file_beside_the_tokenizer_loads_it_again(
    tokenize: Callable, loaded_folders: list[Path], model: Path, name: str
) -> None:
    tokenize()
    file = model / name
    if file.exists():
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 77}))
    else:
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    tokenize()
    assert len(loaded_folders) == 2


def test_another_tokenizer_in_the_same_folder_makes_different_tokens(
    tokenize: Callable, loaded_folders: list[Path], model: Path
) -> None:
    first = np.array(tokenize())
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["r"], vocabulary["b"] = vocabulary["b"], vocabulary["r"]
    file.write_text(json.dumps(content))
    second = np.array(tokenize())
    assert len(loaded_folders) == 2 and len(first) == len(second) and not np.array_equal(first, second)


def test_a_damaged_identity_is_determined_again(
    tokenize: Callable, loaded_folders: list[Path], model: Path, cache: Path
) -> None:
    first = np.array(tokenize())
    for file in (cache / "tokenizers").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    assert np.array_equal(tokenize(), first) and len(loaded_folders) == 2


def test_a_tokenizer_that_files_do_not_identify_is_always_loaded(make_options: Callable) -> None:
    lazy = LazyTokenizer(lambda: "tokenizer", None)
    assert lazy.cached_identity(make_options()) is None and not lazy.identified_by_files
    assert lazy.tokenizer == "tokenizer"


def test_a_folder_that_is_gone_when_the_tokenizer_is_needed_is_named(model: Path) -> None:
    base = load_base_model(schema.ModelConfig(path=str(model)))
    shutil.rmtree(model)
    with pytest.raises(ModelError, match="was removed after the model was loaded"):
        _ = base.tokenizer
