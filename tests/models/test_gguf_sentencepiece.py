"""SentencePiece vocabularies of GGUF files give the ids that SentencePiece gives.

The reference is reference/sentencepiece.json: three small vocabularies that SentencePiece trained, and its own ids for
odd texts, written by reference/make_sentencepiece.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_families
import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from transformers import PreTrainedTokenizerFast

from runner.common.errors import ModelError
from runner.models.gguf.load import load_gguf
from runner.models.gguf.tokenizer import build_tokenizer, stop_token_ids, wrap_tokenizer

PATH = Path("some.gguf")
MODELS: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "sentencepiece.json").read_text())["models"]


def metadata_of(name: str, **changes: Any) -> dict[str, Any]:
    """The metadata of a file with the vocabulary `name`; None removes a key."""
    values = MODELS[name]["metadata"] | changes
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    for key, dtype in (("scores", "<f4"), ("token_type", "<i4")):
        listed = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(listed, list) and all(isinstance(item, int | float) for item in listed):
            metadata[f"tokenizer.ggml.{key}"] = np.array(metadata[f"tokenizer.ggml.{key}"], dtype)
    return metadata


def tokenizer_of(name: str, **changes: Any) -> PreTrainedTokenizerFast:
    return build_tokenizer(metadata_of(name, **changes), PATH)


@pytest.mark.parametrize("name", MODELS)
def test_ids_equal_those_of_sentencepiece(name: str) -> None:
    tokenizer = tokenizer_of(name)
    rows = MODELS[name]["rows"]
    actual = {row["text"]: tokenizer.encode(row["text"], add_special_tokens=False) for row in rows}
    assert actual == {row["text"]: row["ids"] for row in rows}
    assert len(rows) > 25


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_ids_decode_to_the_text_of_sentencepiece_at_once_and_streamed(name: str) -> None:
    tokenizer = wrap_tokenizer(tokenizer_of(name), metadata_of(name))
    for row in MODELS[name]["rows"]:
        assert tokenizer.decode(row["ids"]) == row["decoded"]
        streamed = tokenizer.detokenizer
        streamed.reset()
        for token_id in row["ids"]:
            streamed.add_token(token_id)
        streamed.finalize()
        if name == "gemma" or not row["decoded"].startswith(" "):  # mlx-lm trims more than the prefix
            assert streamed.text == row["decoded"]


def test_a_vocabulary_without_bytes_falls_back_to_the_unknown_token() -> None:
    tokenizer = tokenizer_of("unknown")
    assert tokenizer.encode("日本", add_special_tokens=False)[-1] == tokenizer.unk_token_id


def test_a_part_after_a_special_token_begins_with_the_prefix_again() -> None:
    tokenizer = tokenizer_of("llama")
    part = tokenizer.encode("the fox", add_special_tokens=False)
    assert tokenizer.encode("the fox</s>the fox", add_special_tokens=False) == [*part, 2, *part]
    plain = tokenizer_of("llama", add_space_prefix=False)
    part = plain.encode("the fox", add_special_tokens=False)
    assert not plain.decode(part).startswith(" ") and plain.encode("</s>the fox", add_special_tokens=False) == [
        2,
        *part,
    ]


def test_user_defined_tokens_with_escaped_blanks_are_found_in_the_text() -> None:
    """Files of early converters hold them as SentencePiece writes them."""
    values = MODELS["gemma"]["metadata"]
    tokens = [t.replace(" ", "▁") if k == 4 else t for t, k in zip(values["tokens"], values["token_type"], strict=True)]
    assert tokens != values["tokens"]
    for row in MODELS["gemma"]["rows"]:
        assert tokenizer_of("gemma", tokens=tokens).encode(row["text"], add_special_tokens=False) == row["ids"]


def test_phi3_control_tokens_take_in_the_blanks_after_them() -> None:
    tokens = list(MODELS["llama"]["metadata"]["tokens"])
    types = list(MODELS["llama"]["metadata"]["token_type"])
    tokens[300:302], types[300:302] = ["<|user|>", "<|endoftext|>"], [3, 3]
    metadata = metadata_of("llama", tokens=tokens, token_type=types)
    phi3 = build_tokenizer(metadata | {"general.architecture": "phi3"}, PATH)
    llama = build_tokenizer(metadata | {"general.architecture": "llama"}, PATH)

    def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    assert ids(phi3, "<|user|>\n a") == [300, *ids(phi3, "a")]
    assert ids(llama, "<|user|>\n a") == [300, *ids(llama, "\n a")]
    assert ids(phi3, "<|endoftext|>\n") == [301, *ids(phi3, "\n")]


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({}, 1, None),
        ({"add_bos_token": None, "bos_token_id": None, "eos_token_id": None}, 1, None),
        ({"add_bos_token": False}, None, None),
        ({"add_eos_token": True}, 1, 2),
    ],
)
def test_start_and_end_tokens_are_added_as_configured(
    changes: dict[str, Any], first: int | None, last: int | None
) -> None:
    tokenizer = tokenizer_of("llama", **changes)
    bare = tokenizer.encode("the fox", add_special_tokens=False)
    assert tokenizer.encode("the fox") == ([first] if first else []) + bare + ([last] if last else [])
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_tokens_that_end_a_turn_stop_generation() -> None:
    tokens, types = list(MODELS["llama"]["metadata"]["tokens"]), list(MODELS["llama"]["metadata"]["token_type"])
    tokens[300], types[300] = "<|end|>", 3
    metadata = metadata_of("llama", tokens=tokens, token_type=types, eot_token_id=301)
    assert stop_token_ids(metadata) == [2, 301, 300]
    assert wrap_tokenizer(build_tokenizer(metadata, PATH), metadata).eos_token_ids == {2, 300, 301}
    assert stop_token_ids(metadata_of("gemma")) == [2, MODELS["gemma"]["metadata"]["tokens"].index("<end_of_turn>")]
    types[300] = 1  # a normal piece that looks like it
    assert stop_token_ids(metadata_of("llama", tokens=tokens, token_type=types, eos_token_id=None)) == [2]


@pytest.mark.parametrize(("case", "name"), [("mistral-nemo", "llama"), ("gemma2", "gemma"), ("phi3", "llama")])
def test_a_saved_folder_loads_in_stock_mlx_lm_with_equal_ids(case: str, name: str, tmp_path: Path) -> None:
    tokens = MODELS[name]["metadata"]["tokens"]
    config = gguf_families.CASES[case].config | {"vocab_size": len(tokens)}
    family = gguf_families.Case(gguf_families.CASES[case].architecture, config, gguf_families.CASES[case].metadata)
    file = gguf_families.write_weights(family, gguf_families.weights_of(gguf_families.build_model(config)))
    file.metadata = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.ggml.")}
    file.metadata |= {key: value for key, value in metadata_of(name).items() if not isinstance(value, np.ndarray)}
    file.metadata |= {f"tokenizer.ggml.{key}": MODELS[name]["metadata"][key] for key in ("scores", "token_type")}
    ours = load_gguf(file.write(tmp_path / "tiny.gguf"), keep_quantized=False, dtype=mx.float32)
    folder = tmp_path / "folder"
    mlx_lm.utils.save_model(folder, ours.model)
    mlx_lm.utils.save_config(dict(ours.config), folder / "config.json")
    ours.tokenizer.save_pretrained(folder)
    stock = load_tokenizer(folder, eos_token_ids=ours.config["eos_token_id"])
    for row in MODELS[name]["rows"]:
        assert stock.encode(row["text"]) == ours.tokenizer.encode(row["text"]) == [1, *row["ids"]]
        assert stock.decode(row["ids"]) == row["decoded"]
    assert stock.eos_token_ids == ours.tokenizer.eos_token_ids
    assert type(stock.detokenizer) is type(ours.tokenizer.detokenizer)
    messages = [{"role": "user", "content": "the fox"}]
    assert stock.apply_chat_template(messages) == ours.tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scores": None}, "no score .tokenizer.ggml.scores. for each of its 460 tokens"),
        ({"scores": [1.0]}, "no score"),
        ({"scores": np.arange(460)}, "no score"),
        ({"scores": [float("nan")] * 460}, "is NaN"),
        ({"precompiled_charsmap": np.ones(4, np.uint8)}, "normalizes characters.*safetensors"),
        ({"tokens": ["<0x00>"] * 2, "token_type": [6] * 2, "scores": [0.0] * 2}, "'<0x00>' is in its vocabulary twice"),
        ({"tokens": ["<unk>", "a", "<0x00>"], "token_type": [2, 1, 6], "scores": [0.0] * 3}, "lacks <0x01>"),
        ({"eos_token_id": 460}, "eos_token_id is 460, but there are 460"),
    ],
    ids=str,
)
def test_an_inconsistent_vocabulary_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=rf"some\.gguf: .*{reason}"):
        tokenizer_of("llama", **changes)


WRONG = (0, -1, (1 << 32) - 1, True, float("nan"), "text", np.arange(2), np.ones(460), ["a", "b"], [])


@pytest.mark.parametrize("key", [*MODELS["llama"]["metadata"], "precompiled_charsmap", "remove_extra_whitespaces"])
def test_any_value_under_any_key_builds_or_raises_a_model_error(key: str) -> None:
    refused = 0
    for wrong in WRONG:
        try:
            tokenizer_of("llama", **{key: wrong})
        except ModelError as error:
            assert "some.gguf: " in str(error)
            refused += 1
    assert refused > 3 or key == "pre"
