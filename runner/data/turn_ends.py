"""The special tokens with which a chat template ends an assistant's turn, found by rendering small conversations.

A template may end the last turn with another token than earlier ones (gpt-oss), may leave the end to the token that
opens the next turn (GLM), or may end turns without any token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from runner.data.row_errors import RowError
from runner.data.text_encoder import Message, TextEncoder

_QUESTION, _ANSWER, _NEXT = "Xq", "Xa", "Xn"


class TurnEnds:
    """The strings of a tokenizer's special tokens and which of them end a turn."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    @cached_property
    def stop_tokens(self) -> frozenset[str]:
        """The tokens at which generation stops."""
        tokenizer = self._encoder.tokenizer
        return frozenset(token for token in tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer))) if token)

    @cached_property
    def tokens(self) -> frozenset[str]:
        """The tokens that end a turn: those of the template, and those at which generation stops."""
        return self.stop_tokens | self._template_tokens()

    @cached_property
    def generation_prompt(self) -> str:
        """The text with which the template asks for a turn of the assistant; empty where it cannot be isolated."""
        question = [_user(_QUESTION)]
        with suppress(RowError):
            without, prompted = (self._encoder.render(question, add_generation_prompt=flag) for flag in (False, True))
            # A template may write an EOS token in place of the prompt.
            return prompted[self.whole_tokens(prompted, common_prefix_length(without, prompted)) :]
        return ""

    @cached_property
    def turn_header(self) -> str:
        """The part of the generation prompt that the template also writes before every answer."""
        with suppress(RowError):
            prompted = self._encoder.render([_user(_QUESTION)], add_generation_prompt=True)
            answered = [_user(_QUESTION), _assistant(_ANSWER)]
            # An earlier turn may lack what the last one has, such as an empty reasoning block.
            conversations = (answered, [*answered, _user(_NEXT), _assistant(_ANSWER)])
            common = min(common_prefix_length(prompted, self._encoder.render(each)) for each in conversations)
            return self.generation_prompt[: max(0, common - len(prompted) + len(self.generation_prompt))]
        return ""

    def is_ended(self, turn: str) -> bool:
        """Return whether `turn` ends with a token that ends a turn; white space and other special tokens may follow."""
        rest, ends = turn.rstrip(), tuple(self.tokens)
        if rest.endswith(ends):
            return True
        while special := self._trailing_special(rest):
            if special in ends:
                return True
            rest = rest.removesuffix(special).rstrip()
        return False

    def without_end(self, turn: str) -> str:
        """Return `turn` without the special tokens and the white space at its end."""
        rest = turn.rstrip()
        while special := self._trailing_special(rest):
            rest = rest.removesuffix(special).rstrip()
        return rest

    def length_of_end(self, text: str, start: int, tokens: frozenset[str]) -> int:
        """Return how many characters from `start` belong to the first token there, if it is one of `tokens`; else 0.

        White space before the token counts as part of it.
        """
        match = self._special.match(text, self._skip_space(text, start))
        return match.end() - start if match and match[0] in tokens else 0

    def next_special(self, text: str, start: int) -> int:
        """Return the position after the first special token from `start`, or `start` where there is none."""
        match = self._special.search(text, start)
        return match.end() if match else start

    def _template_tokens(self) -> frozenset[str]:
        """Return the special token after an answer at the end of a conversation, and the one before a next question.

        The latter may also open the question's turn: it counts only where it ends the last turn or a user's as well.
        """
        last = self._tail([_user(_QUESTION), _assistant(_ANSWER)], _ANSWER)
        inner = self._tail([_user(_QUESTION), _assistant(_ANSWER), _user(_NEXT), _assistant("Xb")], _ANSWER)
        users = self._tail([_user(_QUESTION)], _QUESTION)
        at_end = self._specials(last)
        before_next = self._specials(inner.partition(_NEXT)[0])[:1]
        shared = {*at_end, *self._specials(users)}
        return frozenset([*at_end[:1], *(token for token in before_next if token in shared)])

    def _tail(self, messages: list[Message], content: str) -> str:
        """Return what the template writes after `content`; empty where it cannot render the messages."""
        for as_parts in (False, True):
            rendered = [{**m, "content": [{"type": "text", "text": m["content"]}]} if as_parts else m for m in messages]
            try:
                _, found, tail = self._encoder.render(rendered).partition(content)
            except RowError:
                continue
            if found:
                return tail
        return ""

    def _specials(self, text: str) -> list[str]:
        return self._special.findall(text)

    def whole_tokens(self, text: str, end: int) -> int:
        """Return `end`, or the start of the special token that lies across it."""
        return next((m.start() for m in self._special.finditer(text) if m.start() < end < m.end()), end)

    def _trailing_special(self, text: str) -> str | None:
        return next((token for token in self._by_length if text.endswith(token)), None)

    @cached_property
    def _by_length(self) -> list[str]:
        tokenizer = self._encoder.tokenizer
        tokens = {*getattr(tokenizer, "all_special_tokens", ()), *tokenizer.get_added_vocab(), *self.stop_tokens}
        return sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token))

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._by_length)) or r"(?!)")

    @staticmethod
    def _skip_space(text: str, start: int) -> int:
        while start < len(text) and text[start].isspace():
            start += 1
        return start


def stop_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the tokens at which generation stops: of mlx-lm's wrapper a set, of others the EOS token."""
    listed = getattr(tokenizer, "eos_token_ids", None)
    ids = set(listed) if isinstance(listed, Iterable) else set()
    return ids | ({tokenizer.eos_token_id} - {None})


def common_prefix_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return how many items (of a text, characters) two sequences have in common from their start."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
