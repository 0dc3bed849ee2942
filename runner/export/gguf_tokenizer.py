"""The `tokenizer.*` metadata of a GGUF file: the inverse of `runner.models.gguf.tokenizer`.

A model that was read from a GGUF file keeps that file's. Of a Hugging Face tokenizer the vocabulary, merges and special
tokens are written, and the name of the scheme by which llama.cpp splits text: the one that gives the same tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runner.common.errors import ModelError
from runner.models.gguf import tokenizer as reader
from runner.models.gguf.header import Value, read_header
from runner.models.gguf.pre_tokenizers import PRE_TOKENIZERS
from runner.models.gguf.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_STOPS_OF_LLAMA_CPP = {
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
}
"""Tokens at which llama.cpp stops because of their text, in every version since it has a list of them."""
_END_OF_MESSAGE = "<|eom_id|>"
PROBE = (
    "Hello, World! I'm 12345 it's HELLO'S 3.14\n\n\n  naïve café — ﬁ\t\tdef f(x):\n    return x+1 # \r\n日本語, "
    "テキスト русский ЁЖ 🚀🧪  ... ''' $x_1^2$ <a href='b'>ĲĿ</a> ①② 1,000,000.5\u3000\u200b e\u0301 we'll THEY'RE   "
)
"""Text on which the schemes differ: digits, contractions, letters with marks, runs of blanks and of signs."""


def tokenizer_metadata(tokenizer: Any, rows: int, source: Path | None, stop_ids: set[int]) -> dict[str, Value]:
    """Return the metadata of `tokenizer`, a fast tokenizer of transformers.

    Args:
        rows: rows of the embedding; the tokens are filled up to as many, as llama.cpp requires.
        source: the GGUF file that the model was read from, whose tokenizer is copied.
        stop_ids: the tokens at which generation stops.

    Raises:
        ModelError: a kind of tokenizer that the file cannot hold, or that llama.cpp would split in another way.
    """
    template = _templates(tokenizer)
    if source is not None:
        kept = {key: value for key, value in read_header(source).metadata.items() if key.startswith("tokenizer.")}
        return {key: value for key, value in kept.items() if "chat_template" not in key} | template
    specification = json.loads(tokenizer.backend_tokenizer.to_str())
    model = specification["model"]
    if model.get("type") != "BPE":
        raise ModelError(
            f"The tokenizer is of the kind {model.get('type')}, which is not supported as GGUF: BPE alone is."
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    added = {token["id"]: (token["content"], bool(token["special"])) for token in specification["added_tokens"]}
    byte_level = "ByteLevel" in json.dumps([specification.get("pre_tokenizer"), specification.get("decoder")])
    tokens, types = _tokens(model["vocab"], added, rows, tokenizer.unk_token if not byte_level else None)
    values: dict[str, Value] = {
        "tokens": tokens,
        "token_type": types,
        "add_bos_token": _adds(tokenizer, tokenizer.bos_token_id, 0),
        "add_eos_token": _adds(tokenizer, tokenizer.eos_token_id, -1),
    }
    values |= _ids(tokenizer, stop_ids)
    if byte_level:
        values |= {"model": "gpt2", "merges": merges}
        values["pre"] = _find_scheme(tokenizer, values, json.dumps(specification.get("pre_tokenizer")))
    else:
        prefix = json.dumps([specification.get("normalizer"), specification.get("pre_tokenizer")])
        values |= {"model": "llama", "pre": "default", "scores": _scores(tokens, types, model["merges"])}
        values["add_space_prefix"] = '"Prepend"' in prefix or '"prepend_scheme": "always"' in prefix
        values["add_space_prefix"] = values["add_space_prefix"] or '"prepend_scheme": "first"' in prefix
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | template


def read_tokenizer(path: Path) -> Any:
    """Return the tokenizer that the project reads from a GGUF file."""
    return reader.build_tokenizer(read_header(path).metadata, path)


def _templates(tokenizer: Any) -> dict[str, Value]:
    template = tokenizer.chat_template
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    if not isinstance(template, dict) or not template:
        return {}
    named = {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
    values: dict[str, Value] = {"tokenizer.chat_templates": [name for name in template if name != "default"], **named}
    return values | ({"tokenizer.chat_template": template["default"]} if "default" in template else {})


def _tokens(
    vocabulary: dict[str, int], added: dict[int, tuple[str, bool]], rows: int, unknown: str | None
) -> tuple[list[str], np.ndarray]:
    """Return the tokens by id, filled up to `rows`, and their types."""
    if max([*vocabulary.values(), *added], default=0) >= rows:
        raise ModelError(f"The tokenizer has more tokens than the embedding has rows ({rows}).")
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = np.full(rows, UNUSED, np.int32)
    for token, number in vocabulary.items():
        tokens[number] = token
        types[number] = BYTE if unknown is not None and _BYTE_TOKEN.fullmatch(token) else NORMAL
    for number, (token, special) in added.items():
        tokens[number] = token
        types[number] = CONTROL if special else USER_DEFINED
    if unknown is not None and unknown in vocabulary:
        types[vocabulary[unknown]] = UNKNOWN
    return tokens, types


def assign_stops(stops: Mapping[int, str]) -> tuple[dict[str, int], list[str]]:
    """Return the keys for tokens, id to text, that end generation beside the end of text, and those without a place.

    The format has two such keys; llama.cpp stops at some further tokens because of their text. Keys go first to tokens
    that it does not know, then to those that our reader does not. A key names the kind of end where that is known.
    """
    by_need = sorted(stops, key=lambda n: (stops[n] in _STOPS_OF_LLAMA_CPP, stops[n] in reader.TURN_ENDS, n))
    named = sorted(by_need[:2], key=lambda n: (stops[n] == _END_OF_MESSAGE, stops[n] not in reader.TURN_ENDS, n))
    names = ["eot_token_id", "eom_token_id"]
    if [stops[number] for number in named] == [_END_OF_MESSAGE]:
        names = names[1:]
    lost = [stops[number] for number in by_need[2:] if stops[number] not in _STOPS_OF_LLAMA_CPP]
    return dict(zip(names, named, strict=False)), lost


def find_stops(tokenizer: Any, stop_ids: set[int]) -> dict[int, str]:
    """Return the tokens, id to text, that end generation beside the tokenizer's end of text."""
    others = sorted(stop_ids - {_end_of_text(tokenizer, stop_ids)})
    return dict(zip(others, tokenizer.convert_ids_to_tokens(others), strict=True))


def _ids(tokenizer: Any, stop_ids: set[int]) -> dict[str, Value]:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": _end_of_text(tokenizer, stop_ids),
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        **assign_stops(find_stops(tokenizer, stop_ids))[0],
    }
    return {name: int(number) for name, number in ids.items() if number is not None}


def _end_of_text(tokenizer: Any, stop_ids: set[int]) -> int | None:
    """Return the tokenizer's end of text; where it has none, a token that ends generation takes its key."""
    end: int | None = tokenizer.eos_token_id
    return min(stop_ids, default=None) if end is None else end


def _adds(tokenizer: Any, token: int | None, position: int) -> bool:
    """Return whether the tokenizer writes `token` before (position 0) or after (-1) every text."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    return token is not None and len(full) > len(plain) and full[position] == token


def _find_scheme(tokenizer: Any, values: dict[str, Value], description: str) -> str:
    """Return the name of a scheme that splits text as the tokenizer does."""
    expected = tokenizer.encode(PROBE, add_special_tokens=False)
    likely = sorted(
        PRE_TOKENIZERS,
        key=lambda name: not all(json.dumps(pattern)[1:-1] in description for pattern in PRE_TOKENIZERS[name].patterns),
    )
    tried = []
    for name in likely:
        if PRE_TOKENIZERS[name] in tried:
            continue
        tried.append(PRE_TOKENIZERS[name])
        metadata = {f"tokenizer.ggml.{key}": value for key, value in {**values, "pre": name}.items()}
        built = reader.build_tokenizer(metadata, Path("the tokenizer"))
        if built.encode(PROBE, add_special_tokens=False) == expected:
            return name
    raise ModelError("The tokenizer splits text in a way that no scheme of llama.cpp known here does.")


def _scores(tokens: list[str], types: np.ndarray, merges: list[Any]) -> np.ndarray:
    """Return a score for each piece, by which SentencePiece merges in the order of `merges`."""
    scores = np.zeros(len(tokens), np.float32)
    normal = types == NORMAL
    scores[normal] = -(len(merges) + np.arange(len(tokens), dtype=np.float32)[normal])
    ids = {token: number for number, token in enumerate(tokens)}
    rank = 0
    seen: set[str] = set()
    for pair in merges:
        piece = "".join(pair.split(" ", 1) if isinstance(pair, str) else pair)
        if piece in ids and piece not in seen:
            seen.add(piece)
            scores[ids[piece]] = -float(rank)
            rank += 1
    return scores
