"""Build a Hugging Face tokenizer from the `tokenizer.ggml.*` metadata of a GGUF file.

Only byte-level BPE is supported (GPT-2's scheme, `tokenizer.ggml.model` of "gpt2"). The file names its pre-tokenizer
but does not contain its patterns; those below are documented by the models' own tokenizer.json files and by
llama.cpp's vocabulary code.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from runner.common.errors import ModelError, did_you_mean
from runner.common.text import shorten
from runner.models.gguf.header import MetadataSection, Value

# Token types of the GGUF specification that are never split; user-defined ones are not special.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "smollm": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
}
"""The patterns of each pre-tokenizer (`tokenizer.ggml.pre`); each one splits the pieces that the previous one left."""

_ADDS_BOS_BY_DEFAULT = {"llama-bpe"}  # as llama.cpp does where the file does not say
_IGNORES_MERGES = {"llama-bpe"}  # Llama 3 looks up a whole piece before it applies merges
_NORMALIZES_NFC = {"qwen2"}  # as in Qwen2's own tokenizer.json


def build_tokenizer(metadata: dict[str, Value], path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `metadata` of the file `path` describes.

    Raises:
        ModelError: the tokenizer model or pre-tokenizer is not supported, or the vocabulary is missing or
            inconsistent.
    """
    values = _TokenizerMetadata(path, metadata)
    pre_tokenizer = _require_supported_tokenizer(values)
    tokens = values.get("tokens", list) or []
    types = values.get("token_type", np.ndarray)
    types = np.ones(len(tokens), dtype=np.int32) if types is None else types
    if not tokens or types.shape != (len(tokens),):
        raise ModelError(f"{path}: it lists {len(tokens)} tokens and {types.size} token types.")
    tokenizer = _byte_level_bpe(tokens, values.get("merges", list) or [], pre_tokenizer, path)
    _add_unsplit_tokens(tokenizer, tokens, types)
    bos, eos = values.token("bos_token_id", tokens), values.token("eos_token_id", tokens)
    adds_bos = values.get("add_bos_token", bool, pre_tokenizer in _ADDS_BOS_BY_DEFAULT)
    if adds_bos and bos is None:
        raise ModelError(f"{path}: it asks for a start token (add_bos_token) but does not name it (bos_token_id).")
    adds_eos = values.get("add_eos_token", bool, False)
    tokenizer.post_processor = _post_processor(bos if adds_bos else None, eos if adds_eos else None, tokenizer)
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=values.token("unknown_token_id", tokens),
        pad_token=values.token("padding_token_id", tokens),
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
    )


def wrap_tokenizer(tokenizer: PreTrainedTokenizerFast, metadata: dict[str, Value]) -> TokenizerWrapper:
    """Return mlx-lm's wrapper, which stops generation at any of `stop_token_ids`."""
    return TokenizerWrapper(tokenizer, BPEStreamingDetokenizer, eos_token_ids=stop_token_ids(metadata))


def stop_token_ids(metadata: dict[str, Value]) -> list[int]:
    """Return the ids of the end of text, of turn and of message, in this order and without duplicates."""
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(token_id for token_id in ids if type(token_id) is int))


class _TokenizerMetadata(MetadataSection):
    """The `tokenizer.ggml.*` metadata."""

    prefix = "tokenizer.ggml"

    def token(self, key: str, tokens: list[str]) -> str | None:
        """Return the token whose id is at `key`, or None if there is no such key."""
        token_id = self.get(key, int)
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ModelError(f"{self.path}: tokenizer.ggml.{key} is {token_id}, but there are {len(tokens)} tokens.")
        return None if token_id is None else tokens[token_id]


def _require_supported_tokenizer(values: _TokenizerMetadata) -> str:
    """Return the name of the pre-tokenizer, checked to be supported like the tokenizer model."""
    model = values.get("model", str)
    if model != "gpt2":
        kind = "SentencePiece" if model == "llama" else "another kind"
        raise ModelError(
            f"{values.path}: its tokenizer model is {shorten(repr(model))} ({kind}), which is not supported (supported:"
            " 'gpt2', byte-level BPE). Use the model's Hugging Face folder or hub id instead."
        )
    name = values.get("pre", str)
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"{values.path}: its pre-tokenizer (tokenizer.ggml.pre) is {shorten(repr(name))}, which is not supported"
            f" (supported: {', '.join(PRE_TOKENIZERS)}).{did_you_mean(name or '', PRE_TOKENIZERS)} Use the model's"
            " Hugging Face folder or hub id instead."
        )
    return name


def _byte_level_bpe(tokens: list[str], merges: list[str], pre_tokenizer: str, path: Path) -> Tokenizer:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        duplicate = next(token for token_id, token in enumerate(tokens) if ids[token] != token_id)
        raise ModelError(f"{path}: the token {duplicate[:80]!r} is in its vocabulary twice.")
    pairs = []
    for merge in merges:
        left, separator, right = merge.partition(" ")
        if not (separator and left in ids and right in ids and left + right in ids):
            raise ModelError(f"{path}: the merge {merge[:80]!r} does not fit its vocabulary.")
        pairs.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs, ignore_merges=pre_tokenizer in _IGNORES_MERGES))
    patterns = PRE_TOKENIZERS[pre_tokenizer]
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    if pre_tokenizer in _NORMALIZES_NFC:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _add_unsplit_tokens(tokenizer: Tokenizer, tokens: list[str], types: np.ndarray) -> None:
    def of_type(*numbers: int) -> list[str]:
        return [tokens[token_id] for token_id in np.flatnonzero(np.isin(types, numbers)) if tokens[token_id]]

    special = [AddedToken(token, special=True, normalized=False) for token in of_type(_UNKNOWN, _CONTROL)]
    plain = [AddedToken(token, special=False, normalized=False) for token in of_type(_USER_DEFINED)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _post_processor(bos: str | None, eos: str | None, tokenizer: Tokenizer) -> processors.PostProcessor:
    """Return the step that adds `bos` before and `eos` after each text, if given."""
    byte_level = processors.ByteLevel(trim_offsets=False)
    if bos is None and eos is None:
        return byte_level
    prefix, suffix = ([bos] if bos else []), ([eos] if eos else [])
    second = [f"{token}:1" for token in (*prefix, "$B", *suffix)]
    template = processors.TemplateProcessing(
        single=[*prefix, "$A", *suffix],
        pair=[*prefix, "$A", *suffix, *second],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*prefix, *suffix}],
    )
    return processors.Sequence([byte_level, template])
