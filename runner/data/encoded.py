"""What encoding a row gives: one or more token rows, and counts of what the log has to say."""

from __future__ import annotations

from dataclasses import dataclass

Span = tuple[int, int]
"""A half-open range of token positions."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row of the data as token rows, each with the ranges of its supervised tokens."""

    rows: list[tuple[list[int], list[Span]]]
    """More than one where a conversation is rendered turn by turn."""
    lost_reasoning: int = 0
    """Turns whose reasoning the chat template leaves out."""
    lost_context: int = 0
    """Messages that are not supervised, and tools, that the chat template leaves out."""
    unwanted: tuple[bool, ...] = ()
    """Whether each of `rows` is an answer that the model should not give; empty if none is. With both kinds in it, the
    rows are the two answers of a pair."""

    @classmethod
    def single(cls, tokens: list[int], spans: list[Span]) -> Encoded:
        """Return a row that became one token row."""
        return cls([(tokens, spans)])
