"""Locating the assistant's turns in a rendered conversation, or rendering it turn by turn where that cannot be done.

A conversation is rendered once, as the template writes it, and every turn of the assistant is located in the text:
where the template marks them (``{% generation %}``), by its marks; else from the text before a turn, which has to be
what the model sees when it writes the turn, to the token that ends it. What is located is compared with what the row
says. Where a turn cannot be located, is not ended by a token at which the model could stop, or lacks its answer, the
conversation is rendered once for each turn, with what comes before it: the model sees the same at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from runner.data import rendered_row
from runner.data.conversation import Turn, normalize
from runner.data.encoded import Encoded, Span
from runner.data.row_errors import RowError
from runner.data.template_traits import TemplateTraits
from runner.data.text_encoder import Message, TextEncoder
from runner.data.turn_ends import TurnEnds, common_prefix_length

_OTHER_TEMPLATE = "data.template=FILE uses another template"


class ChatEncoder:
    """Encodes conversations with one chat template, whose properties are found once."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.ends = TurnEnds(encoder)
        self.traits = TemplateTraits(encoder)

    def encode(self, messages: list[Message], tools: Any, limit: int, mask_prompt: bool = True) -> Encoded:
        """Return the token rows of a conversation; the turns of the assistant are supervised, their ends included.

        Turns that start at token `limit` or later are not searched: truncation removes them, and locating a turn
        costs a rendering of everything before it. Without `mask_prompt`, everything is supervised except the turns
        that the row leaves out.

        Raises:
            RowError: the template fails, leaves out an answer, or the turns cannot be told apart.
        """
        turns = normalize(messages, self.traits)
        conversation = Conversation(self, turns, tools)
        if not mask_prompt:
            return self._encode_unmasked(conversation, limit)
        if not any(turn.trained for turn in turns):
            return Encoded([(conversation.tokens, [])])
        try:
            located = conversation.locate(limit)
        except _Unlocated:
            return self._encode_turn_by_turn(turns, tools)
        return Encoded(
            [(conversation.tokens, [turn.span for turn in located if turns[turn.index].trained])],
            lost_reasoning=sum(
                rendered_row.loses_reasoning(turns[turn.index], conversation.text[turn.start : turn.end])
                for turn in located
                if turns[turn.index].trained
            ),
            lost_context=rendered_row.lost_context(turns, tools, conversation.text),
        )

    def _encode_turn_by_turn(self, turns: list[Turn], tools: Any) -> Encoded:
        """Return a row for each trained turn: what the model sees before it, and the turn."""
        rows: list[tuple[list[int], list[Span]]] = []
        lost_reasoning = lost_context = 0
        for index, turn in enumerate(turns):
            if not turn.trained:
                continue
            conversation = Conversation(self, turns[: index + 1], tools)
            try:
                located = conversation.locate_last()
            except _Unlocated as reason:
                raise RowError(f"{reason} ({reason.remedy})") from None
            rows.append((conversation.tokens, [located.span]))
            lost_reasoning += rendered_row.loses_reasoning(turn, conversation.text[located.start : located.end])
            lost_context = rendered_row.lost_context(turns[: index + 1], tools, conversation.text)
        return Encoded(rows, lost_reasoning, lost_context)

    def _encode_unmasked(self, conversation: Conversation, limit: int) -> Encoded:
        turns, text = conversation.turns, conversation.text
        for index, turn in enumerate(turns):
            if turn.trained and (lost := rendered_row.lost_answer(turn, text)):
                raise RowError(f"{_lost_message(index, lost)} ({_OTHER_TEMPLATE})")
        conversation.append_missing_end(text)
        spans = [(0, len(conversation.tokens))]
        if any(turn.role == "assistant" and not turn.trained for turn in turns):
            try:
                located = conversation.locate(limit)
            except _Unlocated as reason:
                raise RowError(f"{reason}, so turns cannot be left out ({_OTHER_TEMPLATE})") from None
            untrained = [turn.span for turn in located if not turns[turn.index].trained]
            spans = _complement(untrained, len(conversation.tokens))
        lost_reasoning = sum(rendered_row.loses_reasoning(turn, text) for turn in turns if turn.trained)
        lost_context = rendered_row.lost_context(turns, conversation.tools, text)
        return Encoded([(conversation.tokens, spans)], lost_reasoning, lost_context)


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


class _Unlocated(Exception):
    """A turn cannot be located in this rendering; the message is the reason."""

    remedy = f"{_OTHER_TEMPLATE}, data.mask_prompt=false trains on all tokens"


class _AnswerLost(_Unlocated):
    """The rendering leaves out what an assistant's message says."""

    remedy = _OTHER_TEMPLATE


class Conversation:
    """One rendered conversation and where the assistant's turns are in it."""

    def __init__(self, chat: ChatEncoder, turns: Sequence[Turn], tools: Any) -> None:
        self.turns, self.tools = turns, tools
        self._chat, self._encoder, self._ends = chat, chat.encoder, chat.ends
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
            _Unlocated: one cannot be located, has no end, or lacks its answer.
        """
        located: list[LocatedTurn] = []
        indexes = [index for index, turn in enumerate(self.turns) if turn.role == "assistant"]
        marks = self._marked_ranges(indexes) if self._encoder.has_generation_marks else None
        for index in indexes:
            start, start_token = marks[index][0] if marks else self._find_start(index)
            if start_token >= limit:
                break
            if located and located[-1].end > start:
                raise _Unlocated(f"message {located[-1].index + 1} has no end of its own in the chat template")
            end = marks[index][1] if marks else self._find_end(index, start)
            located.append(self._bounded(index, start, start_token, end))
        return located

    def locate_last(self) -> LocatedTurn:
        """Return the last turn, which is the assistant's.

        Raises:
            _Unlocated: it cannot be located, or lacks its answer.
        """
        index = len(self.turns) - 1
        if self._encoder.has_generation_marks:
            (start, start_token), end = self._last_marked_range()
        else:
            try:
                start, start_token = self._find_start(index)
            except _Unlocated:
                if not self._continue_prompt():
                    raise
                start, start_token = self._find_start(index)
            end = len(self.text)
        return self._bounded(index, start, start_token, end)

    def _continue_prompt(self) -> bool:
        """Replace the text by the last turn's prompt and the turn, where the template rewrites what comes before it.

        Mistral's templates write the system message only where a question is the last message. The model sees the
        prompt; the turn is what follows the last message before it, which both renderings have. Returns False where
        they do not agree on all of that message.
        """
        before = self.turns[-2] if len(self.turns) > 1 else None
        with suppress(RowError):
            prompt = self._encoder.render(self._messages[:-1], self.tools, add_generation_prompt=True)
            first, last = 0, len(prompt)  # the first character of the longest end of the prompt that the text has
            while first < last:
                middle = (first + last) // 2
                first, last = (first, middle) if prompt[middle:] in self.text else (middle + 1, last)
            shared = prompt[first:]
            if before is not None and before.text and before.role != "assistant" and before.text in shared:
                self.text = prompt + self.text[self.text.rindex(shared) + len(shared) :]
                self.__dict__.pop("tokens", None)
                self._last_boundary = (0, 0)
                return True
        return False

    def append_missing_end(self, turn: str) -> None:
        """Append the EOS token where the conversation ends with a `turn` of the assistant that nothing ends."""
        if self.turns[-1].role == "assistant" and not self._ends.is_ended(turn):
            self.tokens = self._encoder.append_eos(self.tokens)

    def _bounded(self, index: int, start: int, start_token: int, end: int) -> LocatedTurn:
        """Return the turn from `start` to `end`, completed by a token that ends it.

        Raises:
            _Unlocated: nothing ends the turn, though the tokenizer has an EOS token; or it lacks its answer.
        """
        turn = self.turns[index]
        rendered = self.text[start:end]
        if turn.trained and (lost := rendered_row.lost_answer(turn, rendered)):
            raise _AnswerLost(_lost_message(index, lost))
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
                raise _Unlocated(f"nothing in the chat template ends message {index + 1}")
            elif turn.trained:
                end = self._ends.next_special(self.text, end)
        end_token = self._count_tokens(self.text[:end]) if end < len(self.text) else len(self.tokens)
        return LocatedTurn(index, start, end, (start_token, end_token))

    def _find_start(self, index: int) -> tuple[int, int]:
        """Return the first character and the first token that the assistant generates for message `index`.

        Raises:
            _Unlocated: it cannot be determined.
        """
        start, start_token = self._find_prompt_end(index)
        header = self._ends.turn_header
        if header and self.text.startswith(header, start) and not self.turns[index].text.startswith(header.strip()):
            # The template opens the turn with a header that its own prompt lacks here, for example after a tool call.
            start += len(header)
            start_token = self._count_tokens(self.text[:start])
        return start, start_token

    def _find_prompt_end(self, index: int) -> tuple[int, int]:
        preceding, prompt = self._messages[:index], ""
        # A template may fail on the messages before a turn (an empty list, say) and yet render the conversation.
        with suppress(RowError):
            prompt = self._encoder.render(preceding, self.tools, add_generation_prompt=True)
            if self.text.startswith(prompt):
                return len(prompt), self._count_tokens(prompt)
            without_prompt = self._encoder.render(preceding, self.tools)
            if without_prompt and self.text.startswith(without_prompt):
                # The generation prompt and the turn agree up to a point: a template may open a reasoning block in the
                # prompt that this turn lacks.
                prompt_tokens = self._encoder.encode(prompt, add_special_tokens=False)
                start = self._ends.whole_tokens(self.text, common_prefix_length(prompt, self.text))
                return start, common_prefix_length(prompt_tokens, self.tokens)
        counted = self._find_start_by_count(index)
        if counted is None or rendered_row.loses_context(self.turns[:index], prompt, self.text[:counted]):
            raise _Unlocated(
                f"the start of message {index + 1} cannot be determined: the chat template renders the messages "
                "before it differently from the whole conversation"
            )
        return counted, self._count_tokens(self.text[:counted])

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
            _Unlocated: it cannot be determined.
        """
        if index == len(self.turns) - 1:
            return len(self.text)
        try:
            alone = Conversation(self._chat, self.turns[: index + 1], self.tools)
        except RowError:  # a template may fail on the beginning of a conversation and yet render the whole
            end = self._find_end_after_text(index, start)
        else:
            if self.text.startswith(alone.text) and len(alone.text) > start:
                return len(alone.text)
            end = self._find_end_as_rendered_last(alone, index, start)
        if end is None:
            raise _Unlocated(
                f"the end of message {index + 1} cannot be determined: the chat template rewrites earlier turns"
            )
        return end

    def _find_end_as_rendered_last(self, alone: Conversation, index: int, start: int) -> int | None:
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
            raise _Unlocated(f"the chat template marks {len(marks)} turns, and the assistant has {len(indexes)}")
        return {
            index: ((start, self._count_tokens(self.text[:start])), end)
            for index, (start, end) in zip(indexes, marks, strict=True)
        }

    def _last_marked_range(self) -> tuple[tuple[int, int], int]:
        marks = self._merged_marks()
        if not marks:
            raise _Unlocated(f"the chat template does not mark message {len(self.turns)} as the assistant's")
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


def _complement(spans: list[Span], length: int) -> list[Span]:
    edges = [0, *(position for span in spans for position in span), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def _lost_message(index: int, lost: str) -> str:
    return f"the chat template leaves out of message {index + 1} {lost}"
