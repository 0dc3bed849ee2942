"""The generated text equals the expected one, white space aside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.common.errors import DataError


class ExactMatch:
    """1.0 where the texts agree after every run of white space counts as one blank."""

    name: str = "exact_match"

    def score(self, row: Mapping[str, Any], text: str) -> float:
        """1.0 or 0.0.

        Raises:
            DataError: the row holds no expected text.
        """
        return float(expected_text(row).split() == text.split())


def expected_text(row: Mapping[str, Any]) -> str:
    """The row's ``completion``, or the content of the last assistant message of its ``messages``.

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
        "This row has no answer to compare with: a metric needs 'completion', or 'messages' with an assistant's turn."
    )
