"""Extracting the SQL statement from generated text and inspecting it without a parser."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

_FENCE = re.compile(r"```[ \t]*(?:sqlite|sql)?[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_LABEL = re.compile(r"\A(?:sql|sqlite|query|answer)\s*:\s*", re.IGNORECASE)
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
# Quoted text and comments are one token each; an unclosed one extends to the end.
_TOKEN = re.compile(
    r"'(?:[^']|'')*(?:'|\Z)|\"(?:[^\"]|\"\")*(?:\"|\Z)|`[^`]*(?:`|\Z)|\[[^\]]*(?:\]|\Z)"
    r"|--[^\n]*|/\*.*?(?:\*/|\Z)|\w+|.",
    re.DOTALL,
)


def first_statement(text: str) -> str:
    """Return the first SQL statement of a generated text, without its semicolon; empty if there is none.

    The content of a code fence takes precedence; otherwise a label such as ``SQL:`` is dropped and the text ends at the
    first blank line. Text after the first semicolon outside quotes and comments is ignored.
    """
    fenced = _FENCE.search(text)
    body = fenced.group(1) if fenced else _BLANK_LINE.split(_LABEL.sub("", text.strip()), maxsplit=1)[0]
    statement = []
    for token in _tokens(body):
        if token == ";":
            break
        statement.append(token)
    return "".join(statement).strip()


def is_ordered(sql: str) -> bool:
    """Return whether the outermost query of `sql` has an ORDER BY."""
    depth, previous = 0, ""
    for token in _significant_tokens(sql):
        depth += (token == "(") - (token == ")")
        if depth == 0 and previous == "ORDER" and token.upper() == "BY":
            return True
        previous = token.upper()
    return False


def expansion(sql: str) -> int:
    """Return an upper bound of the copies that the WITH clauses of `sql` expand to.

    The copies of a definition are at most its mentions times the copies of the definitions that mention it, so the
    product of all mentions is a bound.
    """
    tokens = [_normalize(token) for token in _significant_tokens(sql)]
    copies = 1
    for name, count in Counter(_defined_names(tokens)).items():
        copies *= max(1, tokens.count(name) - count)
    return copies


def _defined_names(tokens: list[str]) -> Iterator[str]:
    """Yield the names before ``AS (``, with or without a list of columns in between: those of WITH and of windows."""
    for index, token in enumerate(tokens):
        if token != "as":
            continue
        after = index + 1
        while tokens[after : after + 1] and tokens[after] in ("not", "materialized"):
            after += 1
        if tokens[after : after + 1] != ["("]:
            continue
        before = index - 1
        if before >= 0 and tokens[before] == ")":
            while before >= 0 and tokens[before] != "(":
                before -= 1
            before -= 1
        if before >= 0:
            yield tokens[before]


def _normalize(token: str) -> str:
    """Return a name as SQLite compares it: without quotes, in lower case."""
    return token.strip("'\"`[]").lower() if token[0] in "'\"`[" else token.lower()


def _significant_tokens(sql: str) -> Iterator[str]:
    return (token for token in _tokens(sql) if not token.isspace() and not token.startswith(("--", "/*")))


def _tokens(sql: str) -> Iterator[str]:
    return (match.group() for match in _TOKEN.finditer(sql))
