"""A Hugging Face tokenizer rebuilt from the `tokenizer.ggml.*` metadata of a GGUF file.

Byte-level BPE only (GPT-2's scheme, `tokenizer.ggml.model` of "gpt2"). How a text is cut before the merges is
not in the file, only its name; the patterns are those which the models of that name were trained with, as their
own tokenizer.json files and llama.cpp's vocabulary code document them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from runner.common.errors import ModelError, did_you_mean
from runner.common.text import shorten
from runner.models.gguf.header import Value

# Token types of the GGUF specification that are matched whole inside a text; only control ones are special.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

SPLITS: dict[str, tuple[str, ...]] = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
"""`tokenizer.ggml.pre` to the patterns that cut a text, each within the pieces the one before it left."""

_DEFAULT_BOS = {"llama-bpe"}  # llama.cpp puts a start token there where the file does not say
_WHOLE_WORDS_FIRST = {"llama-bpe"}  # Llama 3 looks a whole piece up before it merges
_COMPOSED = {"qwen2"}  # Qwen2's own tokenizer brings a text into NFC first


def build(metadata: dict[str, Value], path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `metadata` of the file `path` describes; `save_pretrained` makes a folder of it.

    Raises ModelError, naming the file and what is supported, for another tokenizer model or pre-tokenizer, and
    for a vocabulary that is missing or contradicts itself.
    """
    read = _reader(metadata, path)
    model = read("model", str)
    if model != "gpt2":
        kind = "SentencePiece" if model == "llama" else "of another kind"
        raise ModelError(
            f"{path}: its tokenizer model is {shorten(repr(model))} ({kind}), which is not supported (supported:"
            " 'gpt2', byte-level BPE). Use the model's Hugging Face folder or hub id instead."
        )
    pre = read("pre", str)
    if pre not in SPLITS:
        raise ModelError(
            f"{path}: its pre-tokenizer (tokenizer.ggml.pre) is {shorten(repr(pre))}, which is not supported"
            f" (supported: {', '.join(SPLITS)}).{did_you_mean(pre or '', SPLITS)} Use the model's Hugging Face"
            " folder or hub id instead."
        )
    tokens = read("tokens", list)
    types = read("token_type", np.ndarray, np.ones(len(tokens or ()), dtype=np.int32))
    if not tokens or types.shape != (len(tokens),):
        raise ModelError(f"{path}: it lists {len(tokens or ())} tokens and {types.size} token types.")
    tokenizer = _byte_level(tokens, read("merges", list) or [], pre, path)
    _add_whole_tokens(tokenizer, tokens, types)

    def token(key: str) -> str | None:
        number = read(key, int)
        if number is not None and not 0 <= number < len(tokens):
            raise ModelError(f"{path}: tokenizer.ggml.{key} is {number}, but there are {len(tokens)} tokens.")
        return None if number is None else tokens[number]

    bos, eos = token("bos_token_id"), token("eos_token_id")
    starts = read("add_bos_token", bool, pre in _DEFAULT_BOS)
    tokenizer.post_processor = _frame(
        bos if starts else None, eos if read("add_eos_token", bool, False) else None, tokenizer
    )
    if starts and bos is None:
        raise ModelError(f"{path}: it asks for a start token (add_bos_token) but names none (bos_token_id).")
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=token("unknown_token_id"),
        pad_token=token("padding_token_id"),
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
    )


def wrap(tokenizer: PreTrainedTokenizerFast, metadata: dict[str, Value]) -> TokenizerWrapper:
    """mlx-lm's wrapper, with every token that ends an answer (end of text, of turn, of message)."""
    return TokenizerWrapper(tokenizer, BPEStreamingDetokenizer, eos_token_ids=ending_ids(metadata))


def ending_ids(metadata: dict[str, Value]) -> list[int]:
    """The ids of the tokens that end an answer, the end of text first, each once."""
    named = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(number for number in named if type(number) is int))


def _reader(metadata: dict[str, Value], path: Path) -> Callable:
    def read(key: str, kind: type, default: Value | None = None) -> Value | None:
        value = metadata.get(f"tokenizer.ggml.{key}", default)
        if value is not None and type(value) is not kind:
            raise ModelError(f"{path}: tokenizer.ggml.{key} is a {type(value).__name__}, not a {kind.__name__}.")
        return value

    return read


def _byte_level(tokens: list[str], merges: list[str], pre: str, path: Path) -> Tokenizer:
    ids = {token: number for number, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for number, token in enumerate(tokens) if ids[token] != number)
        raise ModelError(f"{path}: the token {twice[:80]!r} is in its vocabulary twice.")
    pairs = []
    for merge in merges:
        left, blank, right = merge.partition(" ")
        if not (blank and left in ids and right in ids and left + right in ids):
            raise ModelError(f"{path}: the merge {merge[:80]!r} does not fit its vocabulary.")
        pairs.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], types: np.ndarray) -> None:
    def of(*kinds: int) -> list[str]:
        return [tokens[number] for number in np.flatnonzero(np.isin(types, kinds)) if tokens[number]]

    special = [AddedToken(token, special=True, normalized=False) for token in of(_UNKNOWN, _CONTROL)]
    plain = [AddedToken(token, special=False, normalized=False) for token in of(_USER_DEFINED)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _frame(bos: str | None, eos: str | None, tokenizer: Tokenizer) -> processors.PostProcessor:
    """Puts `bos` before and `eos` behind each text, where they are given."""
    untouched = processors.ByteLevel(trim_offsets=False)
    if bos is None and eos is None:
        return untouched
    before, behind = ([bos] if bos else []), ([eos] if eos else [])
    second = [f"{token}:1" for token in (*before, "$B", *behind)]
    template = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *second],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *behind}],
    )
    return processors.Sequence([untouched, template])
