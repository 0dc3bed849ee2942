"""Encoding of text and of conversations with a tokenizer and its chat template."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from runner.common.errors import DataError
from runner.common.text import first_line
from runner.data.row_errors import RowError
from runner.data.template_limits import LimitExceeded, template_limits

Message = dict[str, Any]
_MAX_RENDERED_CHARACTERS = 16_000_000
"""A row has at most a quarter of that."""


class TextEncoder:
    """A tokenizer with its chat template; whatever they raise becomes a RowError.

    `tokenizer` is mlx-lm's TokenizerWrapper or a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        wrapper_answer = getattr(tokenizer, "has_chat_template", None)
        self.has_chat_template: bool = (
            bool(getattr(tokenizer, "chat_template", None)) if wrapper_answer is None else wrapper_answer
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of plain text, by default with the tokenizer's BOS (and EOS) tokens."""
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        except Exception as error:
            raise RowError(f"the tokenizer fails on it ({_describe(error)})") from error

    def append_eos(self, tokens: list[int]) -> list[int]:
        """Return `tokens` with the EOS token, unless they end with it or the tokenizer has none."""
        eos = self.tokenizer.eos_token_id
        return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]

    def render(self, messages: list[Message], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """Return the text that the chat template makes of `messages`.

        Raises:
            RowError: the template raises an error.
            DataError: the template exceeds its limits of time, memory or length.
        """
        try:
            with template_limits():
                text = self._apply_template(messages, tools, add_generation_prompt)
        except LimitExceeded as error:
            raise DataError(
                f"The model's chat template takes {error} for one conversation, so it is refused."
            ) from None
        if len(text) > _MAX_RENDERED_CHARACTERS:
            raise DataError(
                f"The model's chat template makes {len(text):,} characters of one conversation, so it is refused."
            )
        return text

    def encode_chat(self, messages: list[Message], tools: Any = None, add_generation_prompt: bool = False) -> list[int]:
        """Return the token ids of the rendered `messages`, equal to those of mlx-lm's data sets."""
        return self.encode(self.render(messages, tools, add_generation_prompt), add_special_tokens=False)

    def _apply_template(self, messages: list[Message], tools: Any, add_generation_prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False, return_dict=False
            )
            return text
        except (LimitExceeded, MemoryError):
            raise
        # A template is a program of the model's author and may raise anything.
        except Exception as error:
            raise RowError(f"the model's chat template fails on it ({_describe(error)})") from error

    @cached_property
    def generation_prompt(self) -> str:
        """The text with which the template opens an assistant turn; empty where it cannot be isolated."""
        question = [{"role": "user", "content": "."}]
        without, with_prompt = self.render(question), self.render(question, add_generation_prompt=True)
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""

    @cached_property
    def turn_end(self) -> list[int]:
        """The tokens after an assistant's content, from the special token that ends the turn.

        ``[eos]`` where the template ends turns without a special token, ``[]`` where there is no EOS token either.
        """
        content = "answer"
        messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": content}]
        tokens = self.encode(self.render(messages).rpartition(content)[2], add_special_tokens=False)
        first_special = next((index for index, token in enumerate(tokens) if token in self._special_tokens), None)
        if first_special is not None:
            return tokens[first_special:]
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else [eos]

    @cached_property
    def _special_tokens(self) -> frozenset[int]:
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        return frozenset(special | set(self.tokenizer.get_added_vocab().values()))


def _describe(error: Exception) -> str:
    return first_line(str(error))[:200] or type(error).__name__
