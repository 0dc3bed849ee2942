"""Prompts as the rows of a run were encoded: with its chat template and system prompt, or as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from runner.common.errors import DataError
from runner.config.schema import Config
from runner.data.chat_template import TemplateOptions
from runner.data.formats import FORMATS, choose_format, with_system_prompt
from runner.data.readers import read_rows
from runner.data.source import BUILTIN_PREFIX, find_sources
from runner.data.text_encoder import Message, TextEncoder


class PromptEncoder:
    """Encodes what a model is asked as the run's rows were encoded in training."""

    def __init__(self, tokenizer: Any, config: Config, template_args: dict[str, Any] | None = None) -> None:
        """`tokenizer` is that of the base model; `template_args` are further variables for the chat template.

        Raises:
            DataError: the chat template cannot be read, or never reads one of the variables.
        """
        template = TemplateOptions.from_config(config.data)
        template.args.update(template_args or {})
        self.text = TextEncoder(tokenizer, template)
        self.system_prompt = config.data.system_prompt
        """Begins a conversation that has no system message of its own."""
        self._config = config

    @cached_property
    def uses_template(self) -> bool:
        """Whether rows were conversations; otherwise each prompt is a text that the model continues.

        The first row of the data may be read for it.
        """
        chats = self.text.has_chat_template and self._config.data.chat_template
        return bool(chats and not _trained_on_text(self._config, self.text))

    def render(self, messages: Sequence[Message], tools: Any = None, add_generation_prompt: bool = True) -> str:
        """Return the conversation as the chat template writes it.

        Raises:
            RowError: the chat template fails on the messages.
            DataError: the chat template exceeds its limits.
        """
        return self.text.render(with_system_prompt(list(messages), self.system_prompt), tools, add_generation_prompt)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of the prompt for an answer to `messages`; without a template of the last of them alone.

        Raises:
            RowError, DataError: as `render`.
        """
        if not self.uses_template:
            return self.text.encode(str(messages[-1]["content"]))
        return self.text.encode(self.render(messages), add_special_tokens=False)


def _trained_on_text(config: Config, encoder: TextEncoder) -> bool:
    """Return whether the run was trained on plain text, without a template; False if its data cannot be read."""
    data = config.data
    if data.format != "auto":
        return data.format == "text"
    if data.mix is None and not (data.path.startswith(BUILTIN_PREFIX) or Path(data.path).exists()):
        return False
    try:
        source = find_sources(data)[0]
        first = next(iter(read_rows(source.find_files()["train"][0])))
        return choose_format(first, encoder, source.options) is FORMATS["text"]
    except (DataError, KeyError, StopIteration):
        return False
