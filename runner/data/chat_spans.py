"""Locating the assistant's turns among the tokens of a conversation."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from runner.data.row_errors import RowError
from runner.data.text_encoder import Message, TextEncoder

Span = tuple[int, int]
"""A half-open range of token positions."""


class Conversation:
    """One rendered conversation and the spans of the assistant's turns in its tokens."""

    def __init__(self, encoder: TextEncoder, messages: list[Message], tools: Any = None) -> None:
        self.encoder = encoder
        self.messages = messages
        self.tools = tools
        self.text = encoder.render(messages, tools)
        """The rendered conversation."""
        self.tokens = encoder.encode(self.text, add_special_tokens=False)
        self._last_boundary = (0, 0)  # characters and tokens before it
        self._rewrites_earlier_turns = False

    def assistant_spans(self, limit: int) -> list[Span]:
        """Return the token range of every assistant turn, including the tokens that end the turn.

        Turns that start at token `limit` or later are left out: truncation removes them, and locating a turn costs a
        rendering of everything before it.

        Raises:
            RowError: the start or the end of a turn cannot be determined.
        """
        spans = []
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            start = self._find_start(index)
            if start >= limit:
                break
            end = self._find_end(index, start)
            if end is None:
                raise RowError(
                    f"the end of message {index + 1} cannot be determined: the chat template rewrites earlier "
                    "turns and ends them without a special token (data.mask_prompt=false trains on all tokens)"
                )
            spans.append((start, end))
        return spans

    def _find_start(self, index: int) -> int:
        """Return the position of the first token that the assistant generates for message `index`."""
        preceding = self.messages[:index]
        # A template may fail on the messages before a turn (an empty list, say) and yet render the conversation.
        with suppress(RowError):
            start = self._count_tokens(self.encoder.render(preceding, self.tools, add_generation_prompt=True))
            if start is not None:
                return start
            without_prompt = self.encoder.render(preceding, self.tools)
            if without_prompt and self.text.startswith(without_prompt):
                # The generation prompt and the turn agree up to a point: a template may open a reasoning block in the
                # prompt that this turn lacks.
                prompt = self.encoder.encode_chat(preceding, self.tools, add_generation_prompt=True)
                return _common_prefix_length(prompt, self.tokens)
        start = self._find_start_by_count(index)
        if start is None:
            raise RowError(
                f"the start of message {index + 1} cannot be determined: the chat template renders the messages "
                "before it differently from the whole conversation (data.mask_prompt=false trains on all tokens)"
            )
        return start

    def _find_start_by_count(self, index: int) -> int | None:
        """Return the position after the turn's generation prompt, if there is exactly one for every assistant turn.

        This serves templates that render earlier turns differently once later ones follow, and conversations that
        start with an assistant turn.
        """
        prompt = self.encoder.generation_prompt
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        pieces = self.text.split(prompt) if prompt else []
        if len(pieces) != len(turns) + 1:
            return None
        return self._count_tokens(prompt.join(pieces[: turns.index(index) + 1]) + prompt)

    def _find_end(self, index: int, start: int) -> int | None:
        """Return the position after the last token of message `index`, which starts at `start`; None if unknown."""
        if index == len(self.messages) - 1:
            return len(self.tokens)
        if not self._rewrites_earlier_turns:
            with suppress(RowError):
                end = self._count_tokens(self.encoder.render(self.messages[: index + 1], self.tools))
                if end is not None and end > start:
                    return end
            self._rewrites_earlier_turns = True
        turn_end = self.encoder.turn_end
        if not turn_end or turn_end[0] not in self.tokens[start:]:
            return None
        end = self.tokens.index(turn_end[0], start)
        for token in turn_end:
            if self.tokens[end : end + 1] != [token]:
                break
            end += 1
        return end

    def _count_tokens(self, prefix: str) -> int | None:
        """Return the number of tokens of `prefix`, or None where the conversation does not start with it.

        A token that crosses the boundary counts as part of the prefix, as in mlx-lm's offsets. Only the text after
        the last boundary is encoded, so a conversation is encoded about twice, whatever its number of turns.
        """
        if not self.text.startswith(prefix):
            return None
        characters, count = self._last_boundary
        if len(prefix) >= characters:
            piece = self.encoder.encode(prefix[characters:], add_special_tokens=False)
            if self.tokens[count : count + len(piece)] == piece:
                self._last_boundary = (len(prefix), count + len(piece))
                return count + len(piece)
        return len(self.encoder.encode(prefix, add_special_tokens=False))


def prompt_length(encoder: TextEncoder, prompt: str, tokens: list[int]) -> int:
    """Return how many of `tokens`, which encode a prompt and its continuation, belong to the prompt.

    A token that contains characters of both is not counted, so that a one-word answer that merges with the space
    before it is still trained on.
    """
    return _common_prefix_length(encoder.encode(prompt), tokens)


def _common_prefix_length(left: list[int], right: list[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
