"""Build a SentencePiece BPE tokenizer (Llama 2, Mistral, Gemma, Phi-3) from the vocabulary and scores of a GGUF file.

SentencePiece has no list of merges: of all neighbours whose concatenation is a piece it joins those with the highest
score. That equals byte-pair encoding with the merges sorted by the score of what they make, as transformers' converters
do. (A Unigram model over the same scores would choose the most likely segmentation instead, which differs.)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from runner.common.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""The token types of the GGUF specification."""
BLANK = "\u2581"
"""What SentencePiece writes for a blank."""


def sentencepiece_bpe(
    tokens: list[str],
    types: np.ndarray,
    scores: np.ndarray,
    *,
    unknown: str | None,
    add_prefix: bool,
    remove_extra_blanks: bool,
    path: Path,
) -> Tokenizer:
    """Return the tokenizer, still without the tokens that are never split.

    `add_prefix` puts a blank before each text, and before each part of it that follows a special token, as
    SentencePiece does with each part, and llama.cpp.

    Raises:
        ModelError: a score is NaN, or a byte is missing of those that characters outside the vocabulary fall back to.
    """
    if np.isnan(scores).any():
        raise ModelError(f"{path}: a score of its vocabulary (tokenizer.ggml.scores) is NaN.")
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    byte_tokens = {tokens[token_id] for token_id in np.flatnonzero(types == BYTE)}
    missing = {f"<0x{byte:02X}>" for byte in range(256)} - byte_tokens
    if byte_tokens and missing:
        raise ModelError(f"{path}: its vocabulary has bytes, but lacks {min(missing)}.")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bool(byte_tokens),
        )
    )
    steps: list[normalizers.Normalizer] = []
    if remove_extra_blanks:  # before the prefix, as in SentencePiece; only blanks count
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(BLANK)] if add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])
    # In the order by which mlx-lm recognises the decoder and streams text.
    ending = [decoders.Strip(content=" ", left=1, right=0)] if add_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *ending]
    )
    return tokenizer


def _merges(tokens: list[str], types: np.ndarray, scores: np.ndarray) -> list[tuple[str, str]]:
    """Return every way to make a normal piece of two, by falling score, then by the piece's id."""
    normal = {tokens[token_id] for token_id in np.flatnonzero(types == NORMAL)}
    ranked = sorted(np.flatnonzero(types == NORMAL).tolist(), key=lambda token_id: (-scores[token_id], token_id))
    return [
        (token[:split], token[split:])
        for token in (tokens[token_id] for token_id in ranked)
        for split in range(1, len(token))
        if token[:split] in normal and token[split:] in normal
    ]


def with_plain_blanks(tokens: list[str], types: np.ndarray) -> list[str]:
    """Return the tokens, the user-defined ones with blanks as they stand in a text.

    Those are sought in the text before any other step; llama.cpp's converter has written them this way since 2024.
    """
    taken = set(tokens)
    plain = list(tokens)
    for token_id in np.flatnonzero(types == USER_DEFINED):
        replaced = tokens[token_id].replace(BLANK, " ")
        if replaced not in taken:
            plain[token_id] = replaced
            taken.add(replaced)
    return plain
