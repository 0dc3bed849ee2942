"""Questions about one table: each intent draws a question and its query, or raises NotApplicable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tools.text_to_sql import templates
from tools.text_to_sql.content import Cell, Scene, Table
from tools.text_to_sql.draw import Draw
from tools.text_to_sql.query import Condition, Query
from tools.text_to_sql.vocabulary import Column
from tools.text_to_sql.wording import (
    Phrase,
    condition_on,
    expand,
    listed,
    literal,
    phrase_category,
    phrase_number,
    phrase_text,
    plural,
    predicate,
    singular,
)


class NotApplicable(Exception):
    """Raised when the scene lacks a column that the intent needs; another scene is drawn then."""


@dataclass(frozen=True, slots=True)
class Example:
    """A question and the query that answers it."""

    question: str
    query: Query


Intent = Callable[[Scene], Example]
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}


def ask(draw: Draw, choices: Sequence[str], **slots: Any) -> str:
    """Return a sentence from one of the templates, with its alternatives chosen and its slots filled."""
    slots["show"] = expand(draw, templates.SHOW)
    slots["showlow"] = expand(draw, "[show|list|give me|tell me]")
    text = expand(draw, expand(draw, draw.pick(choices)).replace("  ", " ").format(**slots))
    text = text.replace(" ,", ",").replace(" .", ".").replace(" ?", "?")
    return text if draw.chance(0.15) else text[0].upper() + text[1:]


def pick_column(draw: Draw, columns: Sequence[tuple[str, Column]]) -> tuple[str, Column]:
    """Return a random one of the columns.

    Raises:
        NotApplicable: there is none.
    """
    if not columns:
        raise NotApplicable
    return draw.pick(columns)


def pick_columns(draw: Draw, columns: Sequence[tuple[str, Column]], count: int) -> list[tuple[str, Column]]:
    """Return `count` random columns without replacement.

    Raises:
        NotApplicable: there are fewer.
    """
    if len(columns) < count:
        raise NotApplicable
    return draw.sample(columns, count)


def draw_conditions(draw: Draw, table: Table, count: int, excluded: Sequence[str] = ()) -> list[Phrase]:
    """Return conditions on `count` random columns, none of them in `excluded`."""
    usable = [pair for pair in table.described if pair[1].kind != "key" and pair[0] not in excluded]
    return [condition_on(draw, table, *pair) for pair in pick_columns(draw, usable, count)]


def other_columns(table: Table, *chosen: str) -> tuple[str, ...]:
    """Return the columns of the table except `chosen`, which a near miss may select instead."""
    return tuple(name for name, _ in table.header if name not in chosen)


def base_slots(scene: Scene, phrases: Sequence[Phrase] = (), connective: str = "AND") -> dict[str, Any]:
    """Return the slots that all templates share."""
    draw, entity, key = scene.draw, scene.main.entity, scene.main.key[1]
    return {
        "noun": entity.noun, "nouns": entity.nouns, "who": entity.who,
        "pronoun": "who" if entity.who == "who" else "which", "key": key.noun, "keys": key.nouns,
        "group": plural(draw, entity, phrases, connective),
        "each": singular(draw, entity, phrases) if phrases else entity.noun,
        "is": predicate(phrases, connective), "where": f" {connective.lower()} ".join(part.clause for part in phrases),
    }  # fmt: skip


def list_columns(columns: Sequence[Column]) -> dict[str, str]:
    """Return the slots ``{columns}`` (of one thing) and ``{plurals}`` (of several) for the columns."""
    plurals = [column.noun if column.noun.startswith("number of") else column.nouns for column in columns]
    return {"columns": listed([column.noun for column in columns]), "plurals": listed(plurals)}


def filtered(scene: Scene, phrases: Sequence[Phrase], connective: str = "AND") -> Example:
    """Ask for the key, other columns, all columns or the number of the rows that satisfy the conditions."""
    draw, table = scene.draw, scene.main
    where = tuple(part.condition for part in phrases)
    slots = base_slots(scene, phrases, connective)
    key = table.key[0]
    if connective == "OR" or draw.chance(0.45):
        query = Query(key, table.name, where, connective, wrong_selects=other_columns(table, key))
        few = len(phrases) < 3 and draw.chance(0.15)
        return Example(ask(draw, templates.SELECT_WHERE if few else templates.SELECT_KEY, **slots), query)
    if draw.chance(0.5):
        return Example(ask(draw, templates.COUNT, **slots), Query("COUNT(*)", table.name, where, connective))
    if draw.chance(0.25):
        return Example(ask(draw, templates.SELECT_ALL, **slots), Query("*", table.name, where, connective))
    used = [name for name, _ in table.described if any(part.sql.startswith(name + " ") for part in where)]
    free = [pair for pair in table.described if pair[0] not in used]
    chosen = pick_columns(draw, free, draw.pick([1, 2]))
    select = ", ".join(name for name, _ in chosen)
    query = Query(select, table.name, where, connective, wrong_selects=other_columns(table, select))
    slots |= list_columns([column for _, column in chosen])
    return Example(ask(draw, templates.SELECT_COLUMNS, **slots), query)


def one_condition(scene: Scene) -> Example:
    """Rows that satisfy one condition."""
    return filtered(scene, draw_conditions(scene.draw, scene.main, 1))


def year_condition(scene: Scene) -> Example:
    """Rows of one year."""
    name, column = pick_column(scene.draw, scene.main.named("year"))
    value = scene.draw.pick(scene.main.values(name))
    return filtered(scene, [phrase_number(scene.draw, name, column, "eq", value)])


def two_conditions(scene: Scene) -> Example:
    """Rows that satisfy two conditions (AND)."""
    return filtered(scene, draw_conditions(scene.draw, scene.main, 2))


def three_conditions(scene: Scene) -> Example:
    """Rows that satisfy three conditions (AND)."""
    phrases = draw_conditions(scene.draw, scene.main, 2)
    more = [pair for pair in scene.main.named("cat") if not _mentions(phrases, pair[0])]
    name, column = pick_column(scene.draw, more)
    values = scene.draw.sample(sorted(set(map(str, scene.main.values(name)))), scene.draw.pick([1, 2, 2]))
    return filtered(scene, [phrase_category(scene.draw, name, column, values), *phrases])


def either(scene: Scene) -> Example:
    """Rows that satisfy at least one of two conditions (OR)."""
    return filtered(scene, draw_conditions(scene.draw, scene.main, 2), "OR")


def listed_values(scene: Scene) -> Example:
    """Rows whose value is one of several (IN)."""
    name, column = pick_column(scene.draw, scene.main.categories)
    values = scene.draw.sample(sorted(set(map(str, scene.main.values(name)))), 2)
    extra = draw_conditions(scene.draw, scene.main, 1, [name]) if scene.draw.chance(0.3) else []
    return filtered(scene, [phrase_category(scene.draw, name, column, values), *extra])


def excluded_value(scene: Scene) -> Example:
    """Rows whose value is not a given one."""
    name, column = pick_column(scene.draw, scene.main.categories)
    value = str(scene.draw.pick(scene.main.values(name)))
    extra = draw_conditions(scene.draw, scene.main, 1, [name]) if scene.draw.chance(0.3) else []
    return filtered(scene, [phrase_category(scene.draw, name, column, [value], negated=True), *extra])


def in_range(scene: Scene) -> Example:
    """Rows in a range (BETWEEN) whose ends lie between stored values, so that inclusive and exclusive agree."""
    draw = scene.draw
    name, column = pick_column(draw, scene.main.numbers)
    ordered = sorted(scene.main.values(name), key=float)
    first, last = draw.between(1, 3), draw.between(5, 7)
    low, high = (_gap(ordered, index, column) for index in (first, last))
    extra = draw_conditions(draw, scene.main, 1, [name]) if draw.chance(0.25) else []
    return filtered(scene, [phrase_number(draw, name, column, "between", low, high), *extra])


def text_pattern(scene: Scene) -> Example:
    """Rows whose text starts with, ends in or contains something (LIKE)."""
    draw = scene.draw
    name, column = scene.main.key
    value = str(draw.pick(scene.main.values(name)))
    how = draw.pick(["start", "start", "end", "contain"])
    length = draw.pick([1, 1, 2]) if how != "contain" else draw.pick([2, 3])
    start = {"start": 0, "end": len(value) - length, "contain": draw.between(0, max(0, len(value) - length))}[how]
    part = value[start : start + length]
    if " " in part or "'" in part or not part:
        raise NotApplicable
    return filtered(scene, [phrase_text(draw, name, column, how, part)])


def whole_columns(scene: Scene) -> Example:
    """One or more columns of every row."""
    draw, table = scene.draw, scene.main
    chosen = pick_columns(draw, table.described, draw.pick([1, 2, 2, 3]))
    select = ", ".join(name for name, _ in chosen)
    slots = base_slots(scene)
    slots |= list_columns([column for _, column in chosen])
    query = Query(select, table.name, wrong_selects=other_columns(table, select) if len(chosen) == 1 else ())
    return Example(ask(draw, templates.SELECT_COLUMNS, **slots), query)


def count_everything(scene: Scene) -> Example:
    """How many rows there are."""
    return Example(ask(scene.draw, templates.COUNT_EVERYTHING, **base_slots(scene)), Query("COUNT(*)", scene.main.name))


def lookup(scene: Scene) -> Example:
    """One or two columns of the row with a given key."""
    draw, table = scene.draw, scene.main
    key, _ = table.key
    value = draw.pick(table.values(key))
    where = (Condition(f"{key} = {literal(value)}"),)
    chosen = pick_columns(draw, [pair for pair in table.described if pair[0] != key], draw.pick([1, 1, 2]))
    select = ", ".join(name for name, _ in chosen)
    query = Query(select, table.name, where, wrong_selects=other_columns(table, select))
    spoken = " and ".join(column.noun for _, column in chosen)
    choices = templates.LOOKUP_TWO if len(chosen) > 1 else templates.LOOKUP
    return Example(ask(draw, choices, **base_slots(scene), column=spoken, columns=spoken, value=value), query)


def _mentions(phrases: Sequence[Phrase], name: str) -> bool:
    return any(part.condition.sql.startswith(name + " ") for part in phrases)


def _gap(ordered: Sequence[Cell], index: int, column: Column) -> Cell:
    """Return a round number strictly between the value at `index` and the one before it.

    Raises:
        NotApplicable: there is none.
    """
    low, high = float(ordered[index - 1]), float(ordered[index])
    steps = (0.5, 0.1) if column.kind == "real" else (1000, 500, 100, 50, 10, 5, 1)
    for step in steps:
        value = (low // step + 1) * step
        if low < value < high:
            return round(value, 1) if column.kind == "real" else int(value)
    raise NotApplicable


ONE_TABLE: tuple[tuple[Intent, str, int], ...] = (
    (one_condition, "easy", 22),
    (year_condition, "easy", 2),
    (whole_columns, "easy", 4),
    (count_everything, "easy", 1),
    (lookup, "easy", 8),
    (two_conditions, "medium", 16),
    (either, "medium", 5),
    (listed_values, "medium", 5),
    (excluded_value, "medium", 4),
    (in_range, "medium", 6),
    (text_pattern, "medium", 5),
    (three_conditions, "hard", 8),
)
"""Intent, difficulty, weight."""
