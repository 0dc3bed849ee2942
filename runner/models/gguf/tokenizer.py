"""Build a Hugging Face tokenizer from the `tokenizer.ggml.*` metadata of a GGUF file.

Two kinds are supported: byte-level BPE (`tokenizer.ggml.model` of "gpt2"), whose merges the file lists and whose
pre-tokenizer it names, and SentencePiece BPE ("llama"), whose merges follow from scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer, TokenizerWrapper
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from runner.common.errors import ModelError, did_you_mean
from runner.common.text import shorten
from runner.models.gguf.header import MetadataSection, Value
from runner.models.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from runner.models.gguf.sentencepiece import CONTROL, UNKNOWN, USER_DEFINED, sentencepiece_bpe, with_plain_blanks

_SENTENCEPIECE, _BYTE_LEVEL = "llama", "gpt2"

_SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
"""What llama.cpp takes where a file with a SentencePiece tokenizer does not say; byte-level ones have no such ids."""

TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
"""Control tokens that end a turn wherever they occur; files name them only as far as there is a key for them."""

_PHI3_KEEPS_BLANKS_AFTER = ("<unk>", "<s>", "<|endoftext|>")
"""The special tokens of Phi-3's SentencePiece tokenizer that do not take in the blanks after them, as all others do."""


def build_tokenizer(metadata: dict[str, Value], path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `metadata` of the file `path` describes.

    Raises:
        ModelError: the tokenizer model or pre-tokenizer is not supported, or the vocabulary is missing or
            inconsistent.
    """
    values = _TokenizerMetadata(path, metadata)
    scheme = _require_supported_tokenizer(values)
    tokens = values.get("tokens", list) or []
    types = values.get("token_type", np.ndarray)
    types = np.ones(len(tokens), dtype=np.int32) if types is None else types
    if not tokens or types.shape != (len(tokens),):
        raise ModelError(f"{path}: it lists {len(tokens)} tokens and {types.size} token types.")
    if scheme is None:
        tokens = with_plain_blanks(tokens, types)
    _require_distinct(tokens, path)
    bos, eos = values.token("bos_token_id", tokens), values.token("eos_token_id", tokens)
    unknown = values.token("unknown_token_id", tokens)
    tokenizer = (
        _sentencepiece(values, tokens, types, unknown)
        if scheme is None
        else _byte_level_bpe(tokens, values.get("merges", list) or [], scheme, path)
    )
    takes_in_blanks = scheme is None and metadata.get("general.architecture") == "phi3"
    _add_unsplit_tokens(tokenizer, tokens, types, takes_in_blanks)
    adds_bos = values.get("add_bos_token", bool, scheme is None or scheme.adds_bos)
    if adds_bos and bos is None:
        raise ModelError(f"{path}: it asks for a start token (add_bos_token) but does not name it (bos_token_id).")
    adds_eos = values.get("add_eos_token", bool, False)
    tokenizer.post_processor = _post_processor(
        bos if adds_bos else None, eos if adds_eos else None, tokenizer, is_byte_level=scheme is not None
    )
    template = metadata.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        pad_token=values.token("padding_token_id", tokens),
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
    )


def wrap_tokenizer(tokenizer: PreTrainedTokenizerFast, metadata: dict[str, Value]) -> TokenizerWrapper:
    """Return mlx-lm's wrapper, which stops generation at any of `stop_token_ids`."""
    detokenizer: Callable[..., object] = BPEStreamingDetokenizer
    if metadata.get("tokenizer.ggml.model") == _SENTENCEPIECE:
        has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
        detokenizer = SPMStreamingDetokenizer if has_prefix else partial(SPMStreamingDetokenizer, trim_space=False)
    return TokenizerWrapper(tokenizer, detokenizer, eos_token_ids=stop_token_ids(metadata))


def stop_token_ids(metadata: dict[str, Value]) -> list[int]:
    """Return the ids of the end of text, of turn and of message, in this order and without duplicates.

    Besides the ids that the file names, every control token that is known to end a turn counts.
    """
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if ids[0] is None and metadata.get("tokenizer.ggml.model") == _SENTENCEPIECE:
        ids[0] = _SENTENCEPIECE_IDS["eos_token_id"]
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(types, np.ndarray) and types.shape == (len(tokens),):
        ends = set(TURN_ENDS)
        ids += [i for i in np.flatnonzero(np.isin(types, (CONTROL, USER_DEFINED))).tolist() if tokens[i] in ends]
    return list(dict.fromkeys(token_id for token_id in ids if type(token_id) is int))


class _TokenizerMetadata(MetadataSection):
    """The `tokenizer.ggml.*` metadata."""

    prefix = "tokenizer.ggml"

    def token(self, key: str, tokens: list[str]) -> str | None:
        """Return the token whose id is at `key`, or None if there is no such key."""
        default = _SENTENCEPIECE_IDS.get(key) if self.metadata.get(f"{self.prefix}.model") == _SENTENCEPIECE else None
        token_id = self.get(key, int, default)
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ModelError(f"{self.path}: tokenizer.ggml.{key} is {token_id}, but there are {len(tokens)} tokens.")
        return None if token_id is None else tokens[token_id]


def _require_supported_tokenizer(values: _TokenizerMetadata) -> PreTokenizer | None:
    """Return the pre-tokenizer of byte-level BPE, or None for SentencePiece; refuse everything else."""
    model = values.get("model", str)
    if model == _SENTENCEPIECE:
        return None
    if model != _BYTE_LEVEL:
        raise ModelError(
            f"{values.path}: its tokenizer model is {shorten(repr(model))}, which is not supported (supported: 'gpt2',"
            " byte-level BPE, and 'llama', SentencePiece BPE). Use the safetensors of the same model: its Hugging Face"
            " folder or hub id."
        )
    name = values.get("pre", str)
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"{values.path}: its pre-tokenizer (tokenizer.ggml.pre) is {shorten(repr(name))}, which is not supported"
            f" (supported: {', '.join(PRE_TOKENIZERS)}).{did_you_mean(name or '', PRE_TOKENIZERS)} Use the safetensors"
            " of the same model: its Hugging Face folder or hub id."
        )
    return PRE_TOKENIZERS[name]


def _require_distinct(tokens: list[str], path: Path) -> None:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        duplicate = next(token for token_id, token in enumerate(tokens) if ids[token] != token_id)
        raise ModelError(f"{path}: the token {duplicate[:80]!r} is in its vocabulary twice.")


def _sentencepiece(values: _TokenizerMetadata, tokens: list[str], types: np.ndarray, unknown: str | None) -> Tokenizer:
    scores = values.get("scores", np.ndarray)
    if scores is None or scores.shape != (len(tokens),) or scores.dtype.kind != "f":
        raise ModelError(
            f"{values.path}: it has no score (tokenizer.ggml.scores) for each of its {len(tokens)} tokens."
        )
    charsmap = values.get("precompiled_charsmap", np.ndarray)
    if charsmap is not None and charsmap.size:
        raise ModelError(
            f"{values.path}: its tokenizer normalizes characters (tokenizer.ggml.precompiled_charsmap), which is not"
            " supported. Use the safetensors of the same model."
        )
    return sentencepiece_bpe(
        tokens,
        types,
        scores,
        unknown=unknown,
        add_prefix=bool(values.get("add_space_prefix", bool, True)),
        remove_extra_blanks=bool(values.get("remove_extra_whitespaces", bool, False)),
        path=values.path,
    )


def _byte_level_bpe(tokens: list[str], merges: list[str], scheme: PreTokenizer, path: Path) -> Tokenizer:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = []
    for merge in merges:
        left, separator, right = merge.partition(" ")
        if not (separator and left in ids and right in ids and left + right in ids):
            raise ModelError(f"{path}: the merge {merge[:80]!r} does not fit its vocabulary.")
        pairs.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs, ignore_merges=scheme.ignores_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in scheme.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    if scheme.normalizes:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _add_unsplit_tokens(tokenizer: Tokenizer, tokens: list[str], types: np.ndarray, takes_in_blanks: bool) -> None:
    """Register the tokens that are never split; `takes_in_blanks` adds the blanks after control tokens to them."""

    def of_type(*numbers: int) -> list[str]:
        return [tokens[token_id] for token_id in np.flatnonzero(np.isin(types, numbers)) if tokens[token_id]]

    keeps_blanks = frozenset(_PHI3_KEEPS_BLANKS_AFTER if takes_in_blanks else tokens)
    special = [
        AddedToken(token, special=True, normalized=False, rstrip=takes_in_blanks and token not in keeps_blanks)
        for token in of_type(UNKNOWN, CONTROL)
    ]
    plain = [AddedToken(token, special=False, normalized=False) for token in of_type(USER_DEFINED)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _post_processor(
    bos: str | None, eos: str | None, tokenizer: Tokenizer, *, is_byte_level: bool
) -> processors.PostProcessor:
    """Return the step that adds `bos` before and `eos` after each text, if given."""
    byte_level = processors.ByteLevel(trim_offsets=False)
    if is_byte_level and bos is None and eos is None:
        return byte_level
    prefix, suffix = ([bos] if bos else []), ([eos] if eos else [])
    second = [f"{token}:1" for token in (*prefix, "$B", *suffix)]
    template = processors.TemplateProcessing(
        single=[*prefix, "$A", *suffix],
        pair=[*prefix, "$A", *suffix, *second],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*prefix, *suffix}],
    )
    return processors.Sequence([byte_level, template]) if is_byte_level else template
