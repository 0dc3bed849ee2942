"""A small byte-level tokenizer with several kinds of chat templates, and small data sets with a token cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from runner.common.disk_cache import DiskCache
from runner.config.schema import DataConfig
from runner.data import token_cache
from runner.data import tokenize as tokenize_module
from runner.data.encode import TokenBuffer
from runner.data.formats import EncodeOptions
from runner.data.row_errors import RowErrors

CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Adds an empty reasoning block to the last turn and strips those of the others, as Qwen3's does.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    "<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Opens a reasoning block in the generation prompt that a rendered turn lacks, as reasoning models' do.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# No special tokens at all: the boundary of a turn may lie inside a token.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Plain, and every earlier turn is rewritten.
PLAIN_REWRITING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '!' if loop.last else '?' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = "{{ raise_exception('roles must alternate') if messages[0].role == 'assistant' }}" + CHATML

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "user: what is the capital of France? assistant: the capital of France is Paris.",
    "What is two plus two? It is four. Thank you, goodbye!",
    "system: you are a helpful assistant\n\n  indented text, numbers 0123456789",
]


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer(bpe: Tokenizer) -> Callable[..., TokenizerWrapper]:
    def make(template: str | None = CHATML, eos: str = "<|im_end|>") -> TokenizerWrapper:
        inner = PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            eos_token=eos,
            additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        )
        inner.chat_template = template
        return TokenizerWrapper(inner)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., TokenizerWrapper]) -> TokenizerWrapper:
    return make_tokenizer()


@pytest.fixture
def make_options() -> Callable[..., EncodeOptions]:
    def make(method: str = "sft", **changes: Any) -> EncodeOptions:
        return EncodeOptions.from_config(DataConfig(**changes), method)

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, *rows: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def chat_templates() -> dict[str, str]:
    return {
        "CHATML": CHATML,
        "REWRITING": REWRITING,
        "THINKING": THINKING,
        "PLAIN": PLAIN,
        "PLAIN_REWRITING": PLAIN_REWRITING,
        "STRICT": STRICT,
    }


@pytest.fixture
def tokenize(write_rows, tokenizer, make_options):
    """Tokenize rows as a file in memory; return the TokenSet and its stats, or raise for the row errors."""

    def do(*rows, **options):
        errors, buffer = RowErrors(), TokenBuffer()
        file = write_rows("train.jsonl", *rows)
        tokenize_module.tokenize_file(file, tokenizer, make_options(**options), errors, buffer, lambda: None)
        errors.raise_if_any()
        return buffer.to_token_set(), buffer.stats

    return do


CONVERSATIONS = [
    {"messages": [{"role": "user", "content": f"what is {n}?"}, {"role": "assistant", "content": f"the {n * 'a'}"}]}
    for n in range(1, 40)
]


@pytest.fixture
def conversations():
    return CONVERSATIONS


@pytest.fixture
def folder(write_rows, tmp_path, monkeypatch):
    """A data set whose files are cached, although they are small."""
    monkeypatch.setattr(token_cache, "MIN_FILE_BYTES", 1)
    write_rows("data/train.jsonl", *CONVERSATIONS)
    write_rows("data/valid.jsonl", *CONVERSATIONS[:7])
    return tmp_path / "data"


@pytest.fixture
def tokenized_files(monkeypatch):
    """The names of the files that were tokenized instead of found in the cache, as a growing list."""
    names = []
    tokenize_parts = tokenize_module.tokenize_parts

    def recording(parts, *arguments):
        names.extend(part.file.name for part in parts)
        return tokenize_parts(parts, *arguments)

    monkeypatch.setattr(tokenize_module, "tokenize_parts", recording)
    return names


@pytest.fixture
def load(tokenizer, make_options, folder, tmp_path):
    """Load the data set with a cache in `cache`, by default of 1 GB."""

    def do(limit=10**9, path=folder, cache=tmp_path / "cache", tokenizer=tokenizer, **changes):
        options = make_options(**{"max_length": 50} | changes)
        return tokenize_module.load_dataset(str(path), tokenizer, options, cache=DiskCache(cache, limit))

    return do


@pytest.fixture
def load_uncached(tokenizer, make_options, folder):
    """Load the data set without a cache."""
    return lambda: tokenize_module.load_dataset(str(folder), tokenizer, make_options(max_length=50))


@pytest.fixture
def entries(tmp_path):
    """The entries in the cache."""
    return lambda: sorted(path for path in (tmp_path / "cache").iterdir() if len(path.name) == 64)


@pytest.fixture
def replace_bytes():
    """Replace bytes of a file by as many others."""

    def do(file, old, new):
        data = file.read_bytes()
        assert old in data
        assert len(old) == len(new)
        file.write_bytes(data.replace(old, new))

    return do
