"""Exact match: the generated text equals the expected one up to whitespace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.common.errors import DataError


class ExactMatch:
    """Scores 1.0 where the texts are equal after collapsing runs of whitespace."""

    name: str = "exact_match"

    def score(self, row: Mapping[str, Any], text: str) -> float:
        """Return 1.0 or 0.0.

        Raises:
            DataError: the row has no expected text.
        """
        return float(expected_text(row).split() == text.split())


def expected_text(row: Mapping[str, Any]) -> str:
    """Return the row's ``completion``, or the content of the last assistant message of its ``messages``.

    Raises:
        DataError: the row has neither.
    """
    completion = row.get("completion")
    if isinstance(completion, str):
        return completion
    messages = row.get("messages")
    for message in reversed(messages if isinstance(messages, list) else []):
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            content = message.get("content")
            if isinstance(content, str):
                return content
    raise DataError(
        "This row has no answer to compare with: a metric needs 'completion', or 'messages' with an assistant turn."
    )
