"""Encoding conversations as token rows with the assistant's turns supervised.

Where a turn cannot be located in the rendered conversation, because it does not follow its prompt, is not ended by a
token at which the model could stop, or lacks its answer, the conversation is rendered once for each turn, as its prompt
and the turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runner.data import rendered_row
from runner.data.chat_spans import OTHER_TEMPLATE, RenderedChat, Unlocated, lost_message
from runner.data.conversation import Turn, normalize
from runner.data.encoded import Encoded, Span
from runner.data.row_errors import RowError
from runner.data.template_traits import TemplateTraits
from runner.data.text_encoder import Message, TextEncoder
from runner.data.turn_ends import TurnEnds


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
        conversation = self._conversation(turns, tools)
        if not mask_prompt:
            return self._encode_unmasked(conversation, limit)
        if not any(turn.trained for turn in turns):
            return Encoded([(conversation.tokens, [])])
        try:
            located = conversation.locate(limit)
        except Unlocated:
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

    def _conversation(self, turns: Sequence[Turn], tools: Any) -> RenderedChat:
        return RenderedChat(self.encoder, self.ends, self.traits, turns, tools)

    def _encode_turn_by_turn(self, turns: list[Turn], tools: Any) -> Encoded:
        """Return a row for each trained turn: what the model sees before it, and the turn."""
        rows: list[tuple[list[int], list[Span]]] = []
        lost_reasoning = lost_context = 0
        for index, turn in enumerate(turns):
            if not turn.trained:
                continue
            conversation = self._conversation(turns[: index + 1], tools)
            try:
                located = conversation.locate_last()
            except Unlocated as reason:
                raise RowError(f"{reason} ({reason.remedy})") from None
            rows.append((conversation.tokens, [located.span]))
            lost_reasoning += rendered_row.loses_reasoning(turn, conversation.text[located.start : located.end])
            lost_context = rendered_row.lost_context(turns[: index + 1], tools, conversation.text)
        return Encoded(rows, lost_reasoning, lost_context)

    def _encode_unmasked(self, conversation: RenderedChat, limit: int) -> Encoded:
        turns, text = conversation.turns, conversation.text
        for index, turn in enumerate(turns):
            if turn.trained and (lost := rendered_row.lost_answer(turn, text)):
                raise RowError(f"{lost_message(index, lost)} ({OTHER_TEMPLATE})")
        conversation.append_missing_end(text)
        spans = [(0, len(conversation.tokens))]
        if any(turn.role == "assistant" and not turn.trained for turn in turns):
            try:
                located = conversation.locate(limit)
            except Unlocated as reason:
                raise RowError(f"{reason}, so turns cannot be left out ({OTHER_TEMPLATE})") from None
            untrained = [turn.span for turn in located if not turns[turn.index].trained]
            spans = _complement(untrained, len(conversation.tokens))
        lost_reasoning = sum(rendered_row.loses_reasoning(turn, text) for turn in turns if turn.trained)
        lost_context = rendered_row.lost_context(turns, conversation.tools, text)
        return Encoded([(conversation.tokens, spans)], lost_reasoning, lost_context)


def _complement(spans: list[Span], length: int) -> list[Span]:
    edges = [0, *(position for span in spans for position in span), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
