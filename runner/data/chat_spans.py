"""Locating the assistant's turns in a rendered conversation.

A conversation is rendered once, as the template writes it, and every turn of the assistant is located in the text:
where the template marks them (``{% generation %}``), by its marks; else from the end of the prompt for a turn to the
token that ends it. The text before a turn has to be the prompt that the model sees when it writes the turn, and what
is located is compared with what the row says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runner.common.text import shorten
from runner.data import rendered_row
from runner.data.conversation import Turn
from runner.data.encoded import Span
from runner.data.row_errors import RowError
from runner.data.template_traits import THINK_CLOSE, TemplateTraits
from runner.data.text_encoder import TextEncoder
from runner.data.turn_ends import TurnEnds, common_prefix_length

OTHER_TEMPLATE = "data.template=FILE uses another template"


@dataclass(frozen=True, slots=True)
class LocatedTurn:
    """A turn of the assistant in a rendered conversation."""

    index: int
    start: int
    """The character with which it starts."""
    end: int
    """The character after it."""
    span: Span
    """Its tokens."""


class Unlocated(Exception):
    """A turn cannot be located in this rendering; the message is the reason."""

    remedy = f"{OTHER_TEMPLATE}, data.mask_prompt=false trains on all tokens"


class AnswerLost(Unlocated):
    """The rendering leaves out what an assistant's message says."""

    remedy = OTHER_TEMPLATE


class RenderedChat:
    """One rendered conversation and where the assistant's turns are in it."""

    def __init__(
        self, encoder: TextEncoder, ends: TurnEnds, traits: TemplateTraits, turns: Sequence[Turn], tools: Any
    ) -> None:
        """`ends` and `traits` are those of the template of `encoder`."""
        self.turns, self.tools = turns, tools
        self._encoder, self._ends, self._traits = encoder, ends, traits
        self._messages = [turn.message for turn in turns]
        self.text = self._encoder.render(self._messages, tools)
        """The rendered conversation."""
        self._last_boundary = (0, 0)  # characters and tokens before it

    @cached_property
    def tokens(self) -> list[int]:
        """The tokens of the text, and the EOS token where `append_missing_end` appended it."""
        return self._encoder.encode(self.text, add_special_tokens=False)

    def locate(self, limit: int) -> list[LocatedTurn]:
        """Return every turn of the assistant that starts before token `limit`.

        Raises:
            Unlocated: one cannot be located, has no end, or lacks its answer.
        """
        located: list[LocatedTurn] = []
        indexes = [index for index, turn in enumerate(self.turns) if turn.role == "assistant"]
        marks = self._marked_ranges(indexes) if self._encoder.has_generation_marks else None
        for index in indexes:
            start, start_token = marks[index][0] if marks else self._find_start(index)
            if start_token >= limit:
                break
            if marks and (prompt := self._render_prompt(index)) is not None:
                self._require_prompt(prompt, index)
            if located and located[-1].end > start:
                raise Unlocated(f"message {located[-1].index + 1} has no end of its own in the chat template")
            end = marks[index][1] if marks else self._find_end(index, start)
            located.append(self._bounded(index, start, start_token, end))
        return located

    def locate_last(self) -> LocatedTurn:
        """Return the last turn, which is the assistant's; the text becomes the turn's prompt and the turn.

        Raises:
            Unlocated: it cannot be located, or lacks its answer.
            RowError: its reasoning cannot follow the prompt.
        """
        index = len(self.turns) - 1
        start, end = self._follow_prompt(), len(self.text)
        if start is not None:
            start_token = self._count_tokens(self.text[:start])
        elif self._encoder.has_generation_marks:
            (start, start_token), end = self._last_marked_range()
        else:
            start, start_token = self._find_start(index)
        return self._bounded(index, start, start_token, len(self.text) if end is None else end)

    def _follow_prompt(self) -> int | None:
        """Where the rendered text does not begin with the last turn's prompt, replace it by the prompt and the turn.

        A prompt may end with a reasoning block that the turn lacks (Qwen3 with ``enable_thinking=false``), or have
        context that the turn's rendering lacks: Mistral's templates write the system message only where a question is
        the last message.

        Returns:
            The character after the prompt; None where the text begins with the prompt, or nothing can be done.

        Raises:
            RowError: the turn's reasoning cannot follow the prompt.
        """
        index, turn = len(self.turns) - 1, self.turns[-1]
        prompt = self._render_prompt(index)
        if prompt is None:
            return None
        if self.text.startswith(prompt):
            if not self._has_extra_header(index, len(prompt)):
                return None
            extra, rest = "", self.text[len(prompt) + len(self._ends.turn_header) :]
        else:
            split = self._split_from_prompt(prompt)
            if split is None:
                return None
            extra, rest = split
        if extra:
            answer = self._without_think_block(rest.removeprefix(self._ends.turn_header))
            if self._traits.opens_reasoning(extra):
                closing = self._traits.reasoning_closing
                rest = turn.reasoning + closing + answer.lstrip("\n")
            elif rendered_row.contains_reasoning(turn, rest):
                raise RowError(
                    f"the reasoning of message {index + 1} cannot follow the generation prompt, which ends with "
                    f"{shorten(repr(extra), 60)}: remove the reasoning, or set the template's "
                    "variable that makes room for it (data.template_args, such as enable_thinking=true)"
                )
            else:
                rest = answer
        # Encoded apart, as generation does: no token lies across the end of the prompt.
        prompt_tokens = self._encoder.encode(prompt, add_special_tokens=False)
        self.text = prompt + rest
        self.tokens = prompt_tokens + self._encoder.encode(rest, add_special_tokens=False)
        self._last_boundary = (len(prompt), len(prompt_tokens))
        return len(prompt)

    def _split_from_prompt(self, prompt: str) -> tuple[str, str] | None:
        """Return the end of the prompt that the text lacks, and the text after the rest of the prompt; None if unknown.

        The rest of the prompt may differ in earlier messages, but the last one has to be the same.
        """
        before = self.turns[-2]
        header = self._ends.turn_header or self._ends.generation_prompt
        extra = self._ends.generation_prompt.removeprefix(header)
        for end in dict.fromkeys((extra if prompt.endswith(extra) else "", "")):
            head = prompt.removesuffix(end)
            if self.text.startswith(head):
                return end, self.text[len(head) :]
            first, last = 0, len(head)  # the first character of the longest end of the head that the text has
            while first < last:
                middle = (first + last) // 2
                first, last = (first, middle) if head[middle:] in self.text else (middle + 1, last)
            shared = head[first:]
            if before.text and before.text in shared:
                return end, self.text[self.text.rindex(shared) + len(shared) :]
        without_prompt = self._encoder.render(self._messages[:-1], self.tools)
        if without_prompt and self.text.startswith(without_prompt):
            common = self._ends.whole_tokens(self.text, common_prefix_length(prompt, self.text))
            return prompt[common:], self.text[common:]
        rest = self.text.rpartition(before.text)[2] if before.text else ""
        if header and rest.count(header) == 1 and prompt.endswith(header + extra):
            return extra, rest.partition(header)[2]  # the last message itself has another form in the prompt
        return None

    def _without_think_block(self, rest: str) -> str:
        """Return the text of a turn without the reasoning block that it may begin with."""
        block, closing, answer = rest.partition(THINK_CLOSE)
        own = self.turns[-1].text
        if not closing or (own and own in block):
            return rest
        return answer.lstrip("\n")

    def _render_prompt(self, index: int) -> str | None:
        """Return the generation prompt for message `index`; None where the template writes none."""
        if index == 0:
            return None
        # A template may fail on the messages before a turn and yet render the conversation.
        with suppress(RowError):
            return self._encoder.render(self._messages[:index], self.tools, add_generation_prompt=True)
        return None

    def append_missing_end(self, turn: str) -> None:
        """Append the EOS token where the conversation ends with a `turn` of the assistant that nothing ends."""
        if self.turns[-1].role == "assistant" and not self._ends.is_ended(turn):
            self.tokens = self._encoder.append_eos(self.tokens)

    def _bounded(self, index: int, start: int, start_token: int, end: int) -> LocatedTurn:
        """Return the turn from `start` to `end`, completed by a token that ends it.

        Raises:
            Unlocated: nothing ends the turn, though the tokenizer has an EOS token; or it lacks its answer.
        """
        turn = self.turns[index]
        rendered = self.text[start:end]
        if turn.trained and (lost := rendered_row.lost_answer(turn, rendered)):
            raise AnswerLost(lost_message(index, lost))
        is_last = index == len(self.turns) - 1
        if not self._ends.is_ended(rendered):
            # Some templates leave it to the token that opens the next turn to end this one.
            opening = self._ends.length_of_end(self.text, end, self._ends.tokens)
            if opening:
                end += opening
            elif is_last:
                # Without an end of its own, the turn may still lie before text that belongs to nobody.
                end = len(self.text)
                self.append_missing_end(rendered)
            elif self._ends.stop_tokens and turn.trained:
                raise Unlocated(f"nothing in the chat template ends message {index + 1}")
            elif turn.trained:
                end = self._ends.next_special(self.text, end)
        end_token = self._count_tokens(self.text[:end]) if end < len(self.text) else len(self.tokens)
        return LocatedTurn(index, start, end, (start_token, end_token))

    def _find_start(self, index: int) -> tuple[int, int]:
        """Return the first character and the first token that the assistant generates for message `index`.

        Raises:
            Unlocated: it cannot be determined, or the text before it is not the prompt for the turn.
        """
        prompt = self._render_prompt(index)
        if prompt is not None:
            self._require_prompt(prompt, index)
            if self._has_extra_header(index, len(prompt)):
                raise Unlocated(f"message {index + 1} begins with a header that the generation prompt lacks")
            return len(prompt), self._count_tokens(prompt)
        start = self._find_start_by_count(index)
        if start is None:
            raise self._unlocated_start(index)
        return start, self._count_tokens(self.text[:start])

    def _require_prompt(self, prompt: str, index: int) -> None:
        if not self.text.startswith(prompt):
            raise self._unlocated_start(index)

    @staticmethod
    def _unlocated_start(index: int) -> Unlocated:
        return Unlocated(
            f"the start of message {index + 1} cannot be determined: the chat template renders the messages "
            "before it differently from the whole conversation"
        )

    def _has_extra_header(self, index: int, start: int) -> bool:
        """Return whether the turn that follows its prompt opens with the header of turns, as after a tool result."""
        header = self._ends.turn_header
        return bool(
            header and self.text.startswith(header, start) and not self.turns[index].text.startswith(header.strip())
        )

    def _find_start_by_count(self, index: int) -> int | None:
        """Return the character after the turn's generation prompt, if there is exactly one for every assistant turn.

        This serves templates that render earlier turns differently once later ones follow, and conversations that
        start with an assistant turn.
        """
        prompt, header = self._ends.generation_prompt, self._ends.turn_header
        if index == 0 and header in self.text:
            return self.text.index(header) + len(header)
        turns = [i for i, turn in enumerate(self.turns) if turn.role == "assistant"]
        pieces = self.text.split(prompt) if prompt else []
        if len(pieces) != len(turns) + 1:
            return None
        return len(prompt.join(pieces[: turns.index(index) + 1]) + prompt)

    def _find_end(self, index: int, start: int) -> int:
        """Return the character after message `index`, which starts at `start`.

        Raises:
            Unlocated: it cannot be determined.
        """
        if index == len(self.turns) - 1:
            return len(self.text)
        try:
            alone = RenderedChat(self._encoder, self._ends, self._traits, self.turns[: index + 1], self.tools)
        except RowError:  # a template may fail on the beginning of a conversation and yet render the whole
            end = self._find_end_after_text(index, start)
        else:
            if self.text.startswith(alone.text) and len(alone.text) > start:
                return len(alone.text)
            end = self._find_end_as_rendered_last(alone, index, start)
        if end is None:
            raise Unlocated(
                f"the end of message {index + 1} cannot be determined: the chat template rewrites earlier turns"
            )
        return end

    def _find_end_as_rendered_last(self, alone: RenderedChat, index: int, start: int) -> int | None:
        """Return the character after message `index`, of which `alone` ends with another rendering; None if unknown.

        In the whole conversation, the turn may lack its beginning, such as reasoning, and end with another token.
        """
        turn = alone.text[alone._find_start(index)[0] :]
        for ending in dict.fromkeys((turn, turn.rstrip(), self._ends.without_end(turn))):
            length = _overlap(ending, self.text, start)
            if length == 0:
                continue
            end = start + length
            if self._ends.is_ended(self.text[start:end]):
                return end
            if own_end := self._ends.length_of_end(self.text, end, self._ends.tokens):
                end += own_end
                following = common_prefix_length(turn[len(ending) + own_end :], self.text[end:])
                return self._ends.whole_tokens(self.text, end + following)
        return None

    def _find_end_after_text(self, index: int, start: int) -> int | None:
        """Return the character after the token that follows the text of message `index` and ends it; None if none."""
        turn = self.turns[index]
        position = self.text.find(turn.text, start) if turn.text and not turn.calls else -1
        if position < 0:
            return None
        position += len(turn.text)
        length = self._ends.length_of_end(self.text, position, self._ends.tokens)
        return position + length if length else None

    def _marked_ranges(self, indexes: list[int]) -> dict[int, tuple[tuple[int, int], int]]:
        """Return the start (character and token) and the end of every assistant's turn as the template marks them."""
        marks = self._merged_marks()
        if len(marks) != len(indexes):
            raise Unlocated(f"the chat template marks {len(marks)} turns, and the assistant has {len(indexes)}")
        return {
            index: ((start, self._count_tokens(self.text[:start])), end)
            for index, (start, end) in zip(indexes, marks, strict=True)
        }

    def _last_marked_range(self) -> tuple[tuple[int, int], int]:
        marks = self._merged_marks()
        if not marks:
            raise Unlocated(f"the chat template does not mark message {len(self.turns)} as the assistant's")
        start, end = marks[-1]
        return (start, self._count_tokens(self.text[:start])), end

    def _merged_marks(self) -> list[tuple[int, int]]:
        """Return the marked ranges of characters; those that only white space separates are one."""
        merged: list[tuple[int, int]] = []
        for start, end in self._encoder.render_marked(self._messages, self.tools):
            if merged and not self.text[merged[-1][1] : start].strip():
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        return merged

    def _count_tokens(self, prefix: str) -> int:
        """Return the number of tokens of `prefix`, with which the conversation starts.

        A token that crosses the boundary counts as part of the prefix, as in mlx-lm's offsets. Only the text after
        the last boundary is encoded, so a conversation is encoded about twice, whatever its number of turns.
        """
        characters, count = self._last_boundary
        if len(prefix) >= characters:
            piece = self._encoder.encode(prefix[characters:], add_special_tokens=False)
            if self.tokens[count : count + len(piece)] == piece:
                self._last_boundary = (len(prefix), count + len(piece))
                return count + len(piece)
        return len(self._encoder.encode(prefix, add_special_tokens=False))


def prompt_length(encoder: TextEncoder, prompt: str, tokens: list[int]) -> int:
    """Return how many of `tokens`, which encode a prompt and its continuation, belong to the prompt.

    A token that contains characters of both is not counted, so that a one-word answer that merges with the space
    before it is still trained on.
    """
    return common_prefix_length(encoder.encode(prompt), tokens)


def _overlap(turn: str, text: str, start: int) -> int:
    """Return the length of the longest end of `turn` with which `text` continues at `start`."""
    return next((len(turn) - cut for cut in range(len(turn)) if text.startswith(turn[cut:], start)), 0)


def lost_message(index: int, lost: str) -> str:
    """Return what an error says about message `index`, of which the template leaves out `lost`."""
    return f"the chat template leaves out of message {index + 1} {lost}"
