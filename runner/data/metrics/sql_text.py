"""Finds the one SQL statement in a text that a model generated, and reads its shape without a parser."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

_FENCE = re.compile(r"```[ \t]*(?:sqlite|sql)?[ \t]*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_LABEL = re.compile(r"\A(?:sql|sqlite|query|answer)\s*:\s*", re.IGNORECASE)
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n")
# Quoted text and comments, each a token of its own; one that is never closed runs to the end.
_TOKEN = re.compile(
    r"'(?:[^']|'')*(?:'|\Z)|\"(?:[^\"]|\"\")*(?:\"|\Z)|`[^`]*(?:`|\Z)|\[[^\]]*(?:\]|\Z)"
    r"|--[^\n]*|/\*.*?(?:\*/|\Z)|\w+|.",
    re.DOTALL,
)


def first_statement(text: str) -> str:
    """The first SQL statement of a generated text, without its semicolon; empty where there is none.

    A code fence wins over the text around it; else a label such as ``SQL:`` is dropped and the text ends at the
    first blank line. What follows the first semicolon outside quotes and comments is ignored.
    """
    fenced = _FENCE.search(text)
    body = fenced.group(1) if fenced else _BLANK_LINE.split(_LABEL.sub("", text.strip()), maxsplit=1)[0]
    kept = []
    for token in _tokens(body):
        if token == ";":
            break
        kept.append(token)
    return "".join(kept).strip()


def is_ordered(sql: str) -> bool:
    """Whether the outermost query of `sql` has an ORDER BY."""
    depth, before = 0, ""
    for token in _words(sql):
        depth += (token == "(") - (token == ")")
        if depth == 0 and before == "ORDER" and token.upper() == "BY":
            return True
        before = token.upper()
    return False


def expansion(sql: str) -> int:
    """An upper bound of the copies that the WITH clauses of `sql` unfold into.

    The copies of one definition are at most its mentions times the copies of the definitions that mention it, so the
    product of all mentions bounds them.
    """
    words = [_bare(token) for token in _words(sql)]
    copies = 1
    for name, count in Counter(_defined(words)).items():
        copies *= max(1, words.count(name) - count)
    return copies


def _defined(words: list[str]) -> Iterator[str]:
    """The names before ``AS (``, with or without a list of columns between: those of WITH, and of windows."""
    for at, word in enumerate(words):
        if word != "as":
            continue
        after = at + 1
        while words[after : after + 1] and words[after] in ("not", "materialized"):
            after += 1
        if words[after : after + 1] != ["("]:
            continue
        before = at - 1
        if before >= 0 and words[before] == ")":
            while before >= 0 and words[before] != "(":
                before -= 1
            before -= 1
        if before >= 0:
            yield words[before]


def _bare(token: str) -> str:
    """A name as SQLite compares it: without its quotes, in lower case."""
    return token.strip("'\"`[]").lower() if token[0] in "'\"`[" else token.lower()


def _words(sql: str) -> Iterator[str]:
    return (token for token in _tokens(sql) if not token.isspace() and not token.startswith(("--", "/*")))


def _tokens(sql: str) -> Iterator[str]:
    return (match.group() for match in _TOKEN.finditer(sql))
