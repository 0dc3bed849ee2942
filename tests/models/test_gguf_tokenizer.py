"""The tokenizer of a GGUF file splits, merges and frames text like the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, CohereTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from runner.common.errors import ModelError
from runner.models.gguf.pre_tokenizers import PRE_TOKENIZERS
from runner.models.gguf.tokenizer import build_tokenizer, stop_token_ids, wrap_tokenizer

PATH = Path("some.gguf")


def tokenizer_of(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    types = metadata.get("tokenizer.ggml.token_type")
    if isinstance(types, list):
        metadata = metadata | {"tokenizer.ggml.token_type": np.array(types, dtype=np.int32)}
    return build_tokenizer(metadata, PATH)


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """The pieces that `text` is split into before any merge, as substrings of it."""
    spans = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[begin:end] for _, (begin, end) in spans]


PIECES = {
    "smollm": {
        "I'm 123  45": ["I", "'m", " ", "1", "2", "3", "  ", "4", "5"],
        "a²³ b": ["a", "²", "³", " b"],
        "x  \n y": ["x", "  \n", " y"],
        "I'M": ["I", "'", "M"],
    },
    "gpt-2": {
        "I'm 123  45": ["I", "'m", " 123", " ", " 45"],
        "hi!!  there": ["hi", "!!", " ", " there"],
        "I'M": ["I", "'", "M"],
    },
    "default": {
        "ab 12345!": ["ab", " ", "123", "45", "!"],
        "a+b == c": ["a", "+", "b", " ", "==", " c"],
    },
    "llama-bpe": {
        "I'M 12345": ["I", "'M", " ", "123", "45"],
        "x=\n\n  y": ["x", "=\n\n", " ", " y"],
        "(foo) bar\r\n": ["(foo", ")", " bar", "\r\n"],
        "tail   ": ["tail", "   "],
    },
    "qwen2": {
        "I'M 12345": ["I", "'M", " ", "1", "2", "3", "4", "5"],
        "(foo) bar\n \n": ["(foo", ")", " bar", "\n \n"],
    },
    "tekken": {
        "I'M 123 aHTMLParser": ["I", "'M", " ", "1", "2", "3", " a", "HTMLParser"],
        "a/b\n/": ["a", "/b", "\n", "/"],
    },
    "gpt-4o": {"I'M 12345 it's": ["I'M", " ", "123", "45", " it's"], "日本語ABC": ["日本語", "ABC"]},
    "deepseek-llm": {"a 12\n\n日本": ["a", " ", "1", "2", "\n", "\n", "日本"], "x!? y": ["x", "!?", " y"]},
    "deepseek-coder": {"a 12\n日本 x": ["a", " ", "1", "2", "\n", "日本", " x"], "x, $y": ["x", ",", " $", "y"]},
    "deepseek-v3": {"a 12345日本x": ["a", " ", "123", "45", "日本", "x"], "_abc +x\n": ["_abc", " +", "x", "\n"]},
    "starcoder": {"I'M 12": ["I", "'", "M", " ", "1", "2"]},
    "refact": {"x  1": ["x", "  ", "1"]},
    "command-r": {"don't 12": ["don", "'t", " ", "1", "2"]},
    "falcon": {"a`b 1234": ["a", "`", "b", " ", "123", "4"]},
    "qwen35": {"नमस्ते 12": ["नमस्ते", " ", "1", "2"]},
    "seed-coder": {"x=\n\ny": ["x", "=", "\n\n", "y"]},
    "dbrx": {"I'M 1234": ["I", "'M", " ", "123", "4"]},
}


@pytest.mark.parametrize(("pre", "text"), [(pre, text) for pre, texts in PIECES.items() for text in texts])
def test_each_pre_tokenizer_splits_text_as_documented(gguf_files: ModuleType, pre: str, text: str) -> None:
    assert pieces(tokenizer_of(gguf_files.vocabulary(pre=pre)), text) == PIECES[pre][text]


def test_merges_do_not_cross_pieces(gguf_files: ModuleType) -> None:
    smollm, gpt2 = tokenizer_of(gguf_files.vocabulary(pre="smollm")), tokenizer_of(gguf_files.vocabulary(pre="gpt-2"))
    assert smollm.tokenize("hello hello") == ["hello", "Ġhello"]
    assert smollm.tokenize("123") == ["1", "2", "3"]
    assert gpt2.tokenize("123") == ["123"]


def test_llama_bpe_looks_up_whole_pieces_before_it_applies_merges(gguf_files: ModuleType) -> None:
    vocabulary = gguf_files.vocabulary()["tokenizer.ggml.tokens"]
    tokens = [*vocabulary, "xyz"]  # not reachable by merges
    changes = {"tokens": tokens, "token_type": [1] * len(tokens)}
    assert tokenizer_of(gguf_files.vocabulary(pre="llama-bpe", **changes)).tokenize("xyz") == ["xyz"]
    assert tokenizer_of(gguf_files.vocabulary(pre="gpt-2", **changes)).tokenize("xyz") == ["x", "y", "z"]


def test_qwen2_normalizes_text_to_nfc(gguf_files: ModuleType) -> None:
    decomposed, composed = "e\u0301", "\u00e9"
    assert tokenizer_of(gguf_files.vocabulary(pre="qwen2")).encode(decomposed) == tokenizer_of(
        gguf_files.vocabulary(pre="qwen2")
    ).encode(composed)
    assert tokenizer_of(gguf_files.vocabulary()).encode(decomposed) != tokenizer_of(gguf_files.vocabulary()).encode(
        composed
    )


def test_control_tokens_are_special_and_user_defined_ones_are_plain(gguf_files: ModuleType) -> None:
    tokenizer = tokenizer_of(gguf_files.vocabulary())
    ids = tokenizer.encode("a<|start|>b<tool>c")
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "<|start|>", "b", "<tool>", "c"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<tool>c"
    assert tokenizer.decode(ids) == "a<|start|>b<tool>c"


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({"add_bos_token": False}, None, None),
        ({"add_bos_token": True}, 1, None),
        ({"add_bos_token": True, "add_eos_token": True}, 1, 2),
        ({"add_bos_token": None}, None, None),
        ({"add_bos_token": None, "pre": "llama-bpe"}, 1, None),
    ],
)
def test_start_and_end_tokens_are_added_as_configured_also_after_saving(
    gguf_files: ModuleType, tmp_path: Path, changes: dict[str, Any], first: int | None, last: int | None
) -> None:
    tokenizer = tokenizer_of(gguf_files.vocabulary(**changes))
    bare = tokenizer.encode("hello", add_special_tokens=False)
    expected = ([] if first is None else [first]) + bare + ([] if last is None else [last])
    assert tokenizer.encode("hello") == expected
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("hello") == expected


@pytest.mark.parametrize("pre", PIECES)
def test_a_saved_tokenizer_loads_as_the_same_tokenizer(gguf_files: ModuleType, tmp_path: Path, pre: str) -> None:
    tokenizer = tokenizer_of(gguf_files.vocabulary(pre=pre))
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", " hello  12345 <|start|>x<|stop|> <tool>", "日本 é 👍\n\n\tx  ", "e\u0301 I'M"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    messages = [{"role": "user", "content": "hello"}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)


def test_the_wrapper_knows_every_stop_token(gguf_files: ModuleType) -> None:
    metadata = gguf_files.vocabulary(eot_token_id=0)
    assert stop_token_ids(metadata) == [2, 0]
    assert wrap_tokenizer(tokenizer_of(metadata), metadata).eos_token_ids == {0, 2}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre": "smolm"}, "'smolm'.*supported: smollm.*Did you mean 'smollm'"),
        ({"pre": None}, "pre-tokenizer .* is None.*supported: smollm"),
        ({"model": "t5"}, "'t5', which is not supported.*'gpt2'.*'llama', SentencePiece"),
        ({"model": None}, "tokenizer model is None"),
        ({"tokens": None, "token_type": None}, "lists 0 tokens"),
        ({"token_type": [1]}, "1 token types"),
        ({"merges": ["h e", "q z"]}, "merge 'q z' does not fit"),
        ({"merges": ["he"]}, "merge 'he' does not fit"),
        ({"merges": "h e"}, "merges.*where one list is supported"),
        ({"tokens": ["a", "b", "a"], "token_type": [1] * 3, "merges": []}, "token 'a' is in its vocabulary twice"),
        ({"bos_token_id": 5000}, "bos_token_id is 5000, but there are 268 tokens"),
        ({"bos_token_id": None, "add_bos_token": True}, "asks for a start token"),
    ],
    ids=str,
)
def test_an_unsupported_or_inconsistent_tokenizer_is_refused_by_name(
    gguf_files: ModuleType, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=rf"some\.gguf: .*{reason}"):
        tokenizer_of(gguf_files.vocabulary(**changes))


@pytest.mark.parametrize(
    ("pre", "tokenizer_class"),
    [
        ("qwen2", Qwen2Tokenizer),
        ("qwen35", Qwen3_5Tokenizer),
        ("gpt-2", GPT2Tokenizer),
        ("command-r", CohereTokenizer),
    ],
)
def test_ids_equal_those_of_the_tokenizers_that_transformers_builds(
    gguf_files: ModuleType, pre: str, tokenizer_class: Any
) -> None:
    metadata = gguf_files.vocabulary(pre=pre)
    ids = {token: token_id for token_id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split()) for merge in metadata["tokenizer.ggml.merges"]]
    theirs = tokenizer_class(vocab=ids, merges=merges, add_prefix_space=False)
    ours = tokenizer_of(metadata)
    for text in (
        " hello  12345 x",
        "日本 é 👍\n\n\tx  ",
        "e\u0301 I'M it's",
        "नमस्ते ²³ a_b == c\r\n",
        "hello hello 123",
    ):
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


def test_every_pre_tokenizer_keeps_every_character(gguf_files: ModuleType) -> None:
    text = "Hello I'M  12345 日本語ABC def_x=\n\n  y!! 한국 xHTMLParser's/x\u00a0½ \r\n  "
    for pre in PRE_TOKENIZERS:
        assert "".join(pieces(tokenizer_of(gguf_files.vocabulary(pre=pre)), text)) == text, pre
