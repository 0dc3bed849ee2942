"""The tokenizer that a GGUF export writes gives the tokens of the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from runner.common.errors import ModelError
from runner.export.gguf_tokenizer import PROBE, assign_stops, tokenizer_metadata
from runner.models.gguf.tokenizer import build_tokenizer, stop_token_ids

PATH = Path("some.gguf")
REFERENCE = Path(__file__).resolve().parents[1] / "models" / "reference" / "sentencepiece.json"
SENTENCEPIECE: dict[str, Any] = json.loads(REFERENCE.read_text())["models"]


def sentencepiece(name: str) -> PreTrainedTokenizerFast:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in SENTENCEPIECE[name]["metadata"].items()}
    metadata["tokenizer.ggml.scores"] = np.array(metadata["tokenizer.ggml.scores"], "<f4")
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], "<i4")
    return build_tokenizer(metadata, PATH)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_sentencepiece_vocabulary_gives_the_ids_of_sentencepiece(name: str) -> None:
    tokenizer = sentencepiece(name)
    metadata = tokenizer_metadata(tokenizer, len(tokenizer) + 5, None, {2})
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert len(metadata["tokenizer.ggml.tokens"]) == len(tokenizer) + 5  # one for each row of the embedding
    written = build_tokenizer(metadata, PATH)
    for row in SENTENCEPIECE[name]["rows"]:
        assert written.encode(row["text"], add_special_tokens=False) == row["ids"]
        assert written.encode(row["text"]) == tokenizer.encode(row["text"])


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe", "gpt-2"])
def test_the_scheme_that_splits_as_the_tokenizer_does_is_named(pre: str) -> None:
    metadata = {key: value for key, value in gguf_files.vocabulary(pre=pre).items()}
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], "<i4")
    tokenizer = build_tokenizer(metadata, PATH)
    found = tokenizer_metadata(tokenizer, len(tokenizer), None, {2})
    assert found["tokenizer.ggml.pre"] == pre
    assert found["tokenizer.ggml.merges"] == metadata["tokenizer.ggml.merges"]
    assert found["tokenizer.chat_template"] == gguf_files.CHAT_TEMPLATE
    assert build_tokenizer(found, PATH).encode(PROBE) == tokenizer.encode(PROBE)


@pytest.mark.parametrize(
    ("stops", "keys", "lost"),
    [
        ({}, {}, []),
        ({7: "<|im_end|>"}, {"eot_token_id": 7}, []),
        ({8: "<|eom_id|>"}, {"eom_token_id": 8}, []),
        ({8: "<|eom_id|>", 9: "<|eot_id|>"}, {"eot_token_id": 9, "eom_token_id": 8}, []),  # Llama 3.1
        ({1: "<|user|>", 2: "<|observation|>"}, {"eot_token_id": 1, "eom_token_id": 2}, []),  # GLM-4
        ({1: "<|im_end|>", 2: "<a>", 3: "<b>"}, {"eot_token_id": 2, "eom_token_id": 3}, []),  # the first by its text
        ({1: "<|endoftext|>", 2: "<|end|>", 3: "<a>"}, {"eot_token_id": 1, "eom_token_id": 3}, []),
        ({1: "<a>", 2: "<b>", 3: "<c>", 4: "<|end|>"}, {"eot_token_id": 1, "eom_token_id": 2}, ["<c>"]),
    ],
)
def test_stops_take_the_keys_that_the_format_has_and_the_rest_is_named(stops, keys, lost) -> None:
    assert assign_stops(stops) == (keys, lost)


def test_every_stop_of_a_model_is_read_back() -> None:
    tokenizer = sentencepiece("llama")
    metadata = tokenizer_metadata(tokenizer, len(tokenizer), None, {2, 5, 6})
    assert stop_token_ids(metadata) == [2, 5, 6]
    tokenizer.eos_token = None
    assert stop_token_ids(tokenizer_metadata(tokenizer, len(tokenizer), None, {5, 6})) == [5, 6]


def test_other_kinds_are_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, "[UNK]")))
    with pytest.raises(ModelError, match="WordLevel, which is not supported as GGUF"):
        tokenizer_metadata(tokenizer, 2, None, set())


def test_a_vocabulary_larger_than_the_embedding_is_refused() -> None:
    tokenizer = sentencepiece("llama")
    with pytest.raises(ModelError, match="more tokens than the embedding has rows"):
        tokenizer_metadata(tokenizer, len(tokenizer) - 1, None, set())
