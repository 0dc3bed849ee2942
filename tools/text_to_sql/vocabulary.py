"""Read the topics of the questions from ``vocabulary/<split>.txt``.

One entry per line. ``|`` separates fields, ``,`` items, ``/`` alternative spellings in the schema, and ``~`` a
predicate ("are from {}") from the phrase that follows a noun ("from {}")::

    pool NAME = VALUE, VALUE, ...
    table NAMES | singular, plural | who or that
    link NAMES | singular, plural | FOREIGN KEYS | word between child and parent | past verb from parent to child
      COLUMN NAMES | key VALUES or @pool                   | singular, plural
      COLUMN NAMES | cat VALUES or @pool                   | singular, plural | phrase & phrase
      COLUMN NAMES | int LOW-HIGH/STEP (int+, real, year)  | singular, plural | lead, unit | COMPARATIVES | SUPERLATIVES

A phrase whose second half is ``pre`` puts the value before the noun ("jazz records"). Columns of kind ``int+`` may be
summed. Comparatives and superlatives name the greater value first; a comparative that ends in `` -`` is used only
between two rows, never with a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent / "vocabulary"
NUMERIC = ("int", "real", "year")


@dataclass(frozen=True, slots=True)
class Column:
    """A column and its wording in English; `values` for text, `low`, `high` and `step` for numbers."""

    names: tuple[str, ...]
    kind: str
    noun: str
    nouns: str
    values: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    step: int = 1
    additive: bool = False
    phrases: tuple[tuple[str, str], ...] = ()
    unit: str = ""
    comparatives: tuple[str, ...] = ()
    superlatives: tuple[str, ...] = ()

    @property
    def sql_type(self) -> str:
        return {"int": "INTEGER", "year": "INTEGER", "real": "REAL"}.get(self.kind, "TEXT")


@dataclass(frozen=True, slots=True)
class Entity:
    """A kind of thing that has its own table."""

    names: tuple[str, ...]
    noun: str
    nouns: str
    who: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """A reference of child rows to a parent: "concerts by Ann" (`relation` "by"), "Ann gave …" (`verb` "gave")."""

    child: Entity
    keys: tuple[str, ...]
    relation: str
    verb: str


@dataclass(frozen=True, slots=True)
class Topic:
    """A table and, for some topics, a second table that refers to it."""

    entity: Entity
    link: Link | None


@dataclass(slots=True)
class _Block:
    head: list[str]
    columns: list[Column] = field(default_factory=list)


def read_topics(split: str) -> list[Topic]:
    """Return the topics of ``train``, ``valid`` or ``test``, in the order of the file."""
    pools: dict[str, tuple[str, ...]] = {}
    blocks: list[_Block] = []
    for line in (FOLDER / f"{split}.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("pool "):
            name, _, values = line.removeprefix("pool ").partition("=")
            pools[name.strip()] = _items(values)
        elif line.startswith(" "):
            blocks[-1].columns.append(_column(line, pools))
        else:
            blocks.append(_Block(_fields(line)))
    return [_topic(block, _next(blocks, index)) for index, block in enumerate(blocks) if _is(block, "table")]


def _topic(block: _Block, after: _Block | None) -> Topic:
    link = None
    if after is not None and _is(after, "link"):
        _, _, keys, relation, verb = after.head
        link = Link(_entity(after, "that"), _spellings(keys), relation, verb)
    return Topic(_entity(block, block.head[2]), link)


def _entity(block: _Block, who: str) -> Entity:
    noun, nouns = _items(block.head[1])
    return Entity(_spellings(block.head[0].split(" ", 1)[1]), noun, nouns, who, tuple(block.columns))


def _column(line: str, pools: dict[str, tuple[str, ...]]) -> Column:
    names, kind_values, nouns, lead, comparatives, superlatives = (_fields(line) + [""] * 3)[:6]
    kind, _, values = kind_values.partition(" ")
    noun, plural = _items(nouns)
    plural = noun if plural == "-" else plural
    if kind in ("key", "cat"):
        listed = pools[values[1:]] if values.startswith("@") else _items(values)
        phrases = tuple(_halves(part) for part in lead.split(" & ") if part)
        return Column(_spellings(names), kind, noun, plural, values=listed, phrases=phrases)
    span, _, step = values.partition("/")
    low, _, high = span.partition("-")
    phrase, _, unit = lead.partition(", ")
    return Column(
        _spellings(names),
        kind.rstrip("+"),
        noun,
        plural,
        low=float(low),
        high=float(high),
        step=int(step or 1),
        additive=kind.endswith("+"),
        phrases=(_halves(phrase),) if phrase else (),
        unit=unit,
        comparatives=_items(comparatives),
        superlatives=_items(superlatives) or (f"with the highest {noun}", f"with the lowest {noun}"),
    )


def _fields(line: str) -> list[str]:
    return [part.strip() for part in line.split("|")]


def _items(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _spellings(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("/"))


def _halves(phrase: str) -> tuple[str, str]:
    finite, _, after_noun = phrase.partition("~")
    return finite.strip(), after_noun.strip()


def _next(blocks: list[_Block], index: int) -> _Block | None:
    return blocks[index + 1] if index + 1 < len(blocks) else None


def _is(block: _Block, word: str) -> bool:
    return block.head[0].startswith(word + " ")
