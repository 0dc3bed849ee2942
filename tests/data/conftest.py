"""A small byte-level tokenizer, made on the spot, with chat templates of several manners."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from runner.data.formats import Reading

CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Adds an empty thought to the last turn and strips the thoughts of the others, as Qwen3's does.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    "<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Opens a thought in the prompt that a rendered turn does not have, as reasoning models' do.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# No special tokens at all: the border of a turn may lie inside a token.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Plain, and each earlier turn is rewritten.
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
def reading() -> Callable[..., Reading]:
    def make(**changes: Any) -> Reading:
        usual = {"format": "auto", "mask_prompt": True, "max_length": 2048, "on_too_long": "truncate"}
        return Reading(**{**usual, **changes})

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
