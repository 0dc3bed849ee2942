"""A tokenizer of a folder is loaded where tokens are to be made, and only there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlx_lm import utils

from runner.common.errors import ModelError
from runner.config import schema
from runner.data.lazy_tokenizer import LazyTokenizer
from runner.data.token_cache import TokenCache
from runner.data.tokenize import load_dataset
from runner.export.mlx import write_model_folder
from runner.models.load import load_base_model


@pytest.fixture
def model(tmp_path: Path, cache: Path) -> Path:
    write_model_folder(load_base_model(schema.ModelConfig(path="builtin:tiny")), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose tokenizers were loaded."""
    own, found = utils.load_tokenizer, []

    def watched(folder: Path, *rest: object, **more: object) -> object:
        found.append(Path(folder))
        return own(folder, *rest, **more)

    monkeypatch.setattr(utils, "load_tokenizer", watched)
    return found


@pytest.fixture
def tokens(model: Path, tmp_path: Path, write_rows: Callable, reading: Callable) -> Callable[[], np.ndarray]:
    """The tokens of two rows, as a run gets them."""
    file = write_rows("train.jsonl", {"text": "swap: red blue"}, {"text": "blue red"})

    def make() -> np.ndarray:
        base = load_base_model(schema.ModelConfig(path=str(model)))
        kept = TokenCache(tmp_path / "tokens", 10**9)
        return load_dataset(
            str(file.parent), base.lazy_tokenizer, reading(format="text"), ("train",), kept
        ).train.tokens

    return make


def test_where_tokens_are_kept_no_tokenizer_is_loaded(tokens: Callable, loads: list[Path], model: Path) -> None:
    first = np.array(tokens())
    assert loads == [model]
    assert tokens().tobytes() == first.tobytes() and loads == [model]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "new_file.json", "additional_chat_templates/other.jinja"])
def test_a_changed_file_beside_the_tokenizer_has_it_loaded_again(
    tokens: Callable, loads: list[Path], model: Path, name: str
) -> None:
    tokens()
    file = model / name
    if file.exists():
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 77}))
    else:
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    tokens()
    assert len(loads) == 2


def test_another_tokenizer_of_the_same_folder_makes_other_tokens(
    tokens: Callable, loads: list[Path], model: Path
) -> None:
    first = np.array(tokens())
    file = model / "tokenizer.json"
    about = json.loads(file.read_text())
    words = about["model"]["vocab"]
    a, b = (next(token for token in words if token == letter) for letter in "rb")
    words[a], words[b] = words[b], words[a]
    file.write_text(json.dumps(about))
    second = np.array(tokens())
    assert len(loads) == 2 and len(first) == len(second) and not np.array_equal(first, second)


def test_what_was_kept_and_is_damaged_is_found_out_again(
    tokens: Callable, loads: list[Path], model: Path, cache: Path
) -> None:
    first = np.array(tokens())
    for file in (cache / "tokenizers").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    assert np.array_equal(tokens(), first) and len(loads) == 2


def test_a_tokenizer_with_a_say_of_its_own_is_always_loaded(reading: Callable) -> None:
    later = LazyTokenizer(lambda: "it", None)
    assert later.known(reading()) is None and not later.known_by_files
    assert later.tokenizer == "it"


def test_a_folder_that_is_gone_when_the_tokenizer_is_needed_is_named(model: Path) -> None:
    base = load_base_model(schema.ModelConfig(path=str(model)))
    shutil.rmtree(model)
    with pytest.raises(ModelError, match="was removed after the model was loaded"):
        _ = base.tokenizer
