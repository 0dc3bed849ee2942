"""Encoding of text and of conversations with a tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

from runner.common.errors import DataError
from runner.common.text import first_line
from runner.data.chat_template import TemplateOptions, has_generation_marks, require_read, with_fixed_date, writes_date
from runner.data.row_errors import RowError
from runner.data.template_limits import LimitExceeded, template_limits

Message = dict[str, Any]
_Found = TypeVar("_Found")
_MAX_RENDERED_CHARACTERS = 16_000_000
"""A row has at most a quarter of that."""


class TextEncoder:
    """A tokenizer with its chat template; whatever they raise becomes a RowError.

    `tokenizer` is mlx-lm's TokenizerWrapper or a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any, template: TemplateOptions | None = None) -> None:
        """Raises DataError for a variable in `template` that the chat template never reads."""
        self.tokenizer = tokenizer
        self.template = template or TemplateOptions()
        wrapper_answer = getattr(tokenizer, "has_chat_template", None)
        self.has_chat_template: bool = self.template.text is not None or (
            bool(getattr(tokenizer, "chat_template", None)) if wrapper_answer is None else wrapper_answer
        )
        self._found: dict[Any, Any] = {}
        self._custom_code = self.template.text is None and getattr(tokenizer, "_chat_template", None) is not None
        if self.template.args and self.template_text is not None:
            thinking = getattr(tokenizer, "_thinking_kwarg", None)  # mlx-lm's wrapper renames enable_thinking to it
            require_read(self.template.args, self.template_text, {"enable_thinking": thinking} if thinking else {})

    def find_once(self, find: Callable[[TextEncoder], _Found]) -> _Found:
        """Return what `find` finds out about this encoder; called again, the same object."""
        if find not in self._found:
            self._found[find] = find(self)
        found: _Found = self._found[find]
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of plain text, by default with the tokenizer's BOS (and EOS) tokens.

        A text that begins with the BOS token, as one that was rendered before does, gets no second one.
        """
        try:
            tokens = list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))
        except Exception as error:
            raise RowError(f"the tokenizer fails on it ({_describe(error)})") from error
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return tokens[1:] if add_special_tokens and bos is not None and tokens[:2] == [bos, bos] else tokens

    def append_eos(self, tokens: list[int]) -> list[int]:
        """Return `tokens` with the EOS token, unless they end with it or the tokenizer has none."""
        eos = self.tokenizer.eos_token_id
        return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]

    def render(self, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """Return the text that the chat template makes of `messages`.

        Raises:
            RowError: the template raises an error.
            DataError: the template exceeds its limits of time, memory or length.
        """
        text = self._within_limits(lambda: self._apply_template(list(messages), tools, add_generation_prompt))
        assert isinstance(text, str)
        return text

    def render_marked(self, messages: Sequence[Message], tools: Any = None) -> list[tuple[int, int]]:
        """Return the ranges of characters of the rendered text that the template marks as the assistant's.

        Raises:
            RowError, DataError: as `render`.
        """
        marks: list[tuple[int, int]] = self._within_limits(lambda: self._marks(list(messages), tools))
        return marks

    def encode_chat(
        self, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = False
    ) -> list[int]:
        """Return the token ids of the rendered `messages`, equal to those of mlx-lm's data sets."""
        return self.encode(self.render(messages, tools, add_generation_prompt), add_special_tokens=False)

    @cached_property
    def template_text(self) -> str | None:
        """The template in use, where there is one text: not for templates in Python and for several named ones."""
        text = self.template.text
        if text is None and not self._custom_code:
            text = getattr(self.tokenizer, "chat_template", None)
        return text if isinstance(text, str) else None

    @cached_property
    def has_generation_marks(self) -> bool:
        """Whether the template marks what the assistant writes."""
        return self.template_text is not None and has_generation_marks(self.template_text)

    @cached_property
    def _replacing_template(self) -> str | None:
        """The template to pass along; None where the tokenizer's own is used as it is."""
        text = self.template_text
        if text is not None and self.template.date is not None and writes_date(text):
            return with_fixed_date(text, self.template.date)
        return self.template.text

    def _within_limits(self, render: Any) -> Any:
        try:
            with template_limits():
                rendered = render()
        except LimitExceeded as error:
            raise DataError(
                f"The model's chat template takes {error} for one conversation, so it is refused."
            ) from None
        if len(rendered) > _MAX_RENDERED_CHARACTERS:
            raise DataError(
                f"The model's chat template makes {len(rendered):,} characters of one conversation, so it is refused."
            )
        return rendered

    def _apply_template(self, messages: list[Message], tools: Any, add_generation_prompt: bool) -> str:
        arguments = dict(self.template.args)
        if self._replacing_template is not None:
            arguments["chat_template"] = self._replacing_template
        try:
            text: str = self._renderer.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                return_dict=False,
                **arguments,
            )
            return text
        except (LimitExceeded, MemoryError):
            raise
        # A template is a program of the model's author and may raise anything.
        except Exception as error:
            raise RowError(f"the model's chat template fails on it ({_describe(error)})") from error

    def _marks(self, messages: list[Message], tools: Any) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        without_nulls = [{key: value for key, value in m.items() if value is not None} for m in messages]
        arguments = dict(self.template.args)
        thinking = getattr(self.tokenizer, "_thinking_kwarg", None)  # mlx-lm's wrapper passes it by default
        if thinking is not None:
            if "enable_thinking" in arguments:
                arguments[thinking] = arguments.pop("enable_thinking")
            arguments.setdefault(thinking, self.tokenizer.has_thinking)
        try:
            _, marks = render_jinja_template(
                conversations=[without_nulls],
                tools=tools,
                chat_template=self._replacing_template or self.template_text,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **arguments},
            )
        except (LimitExceeded, MemoryError):
            raise
        except Exception as error:
            raise RowError(f"the model's chat template fails on it ({_describe(error)})") from error
        return [(start, end) for start, end in marks[0] if end > start]

    @cached_property
    def _renderer(self) -> Any:
        """What applies the template: the tokenizer, or inside mlx-lm's wrapper the one that takes another template."""
        if self.template.text is not None and getattr(self.tokenizer, "_chat_template", None) is not None:
            return self.tokenizer._tokenizer
        return self.tokenizer


def _describe(error: Exception) -> str:
    return first_line(str(error))[:200] or type(error).__name__
