"""Questions about one table: each intent draws a question and its query, or gives up on a scene that lacks a column."""

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
    Said,
    condition_on,
    expand,
    listed,
    literal,
    plural,
    predicate,
    say_category,
    say_number,
    say_text,
    singular,
)


class NotHere(Exception):
    """The scene lacks what the intent needs; draw another."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A question and the query that answers it."""

    question: str
    query: Query


Intent = Callable[[Scene], Draft]
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}


def ask(draw: Draw, choices: Sequence[str], **slots: Any) -> str:
    """One of the templates, its choices made and its slots filled, as a sentence."""
    slots["show"] = expand(draw, templates.SHOW)
    slots["showlow"] = expand(draw, "[show|list|give me|tell me]")
    text = expand(draw, expand(draw, draw.pick(choices)).replace("  ", " ").format(**slots))
    text = text.replace(" ,", ",").replace(" .", ".").replace(" ?", "?")
    return text if draw.chance(0.15) else text[0].upper() + text[1:]


def one(draw: Draw, columns: Sequence[tuple[str, Column]]) -> tuple[str, Column]:
    """Any of the columns.

    Raises:
        NotHere: there is none.
    """
    if not columns:
        raise NotHere
    return draw.pick(columns)


def several(draw: Draw, columns: Sequence[tuple[str, Column]], count: int) -> list[tuple[str, Column]]:
    """`count` different columns.

    Raises:
        NotHere: there are fewer.
    """
    if len(columns) < count:
        raise NotHere
    return draw.sample(columns, count)


def conditions(draw: Draw, table: Table, count: int, spared: Sequence[str] = ()) -> list[Said]:
    """Conditions on `count` columns, none of them in `spared`."""
    usable = [pair for pair in table.described if pair[1].kind != "key" and pair[0] not in spared]
    return [condition_on(draw, table, *pair) for pair in several(draw, usable, count)]


def others(table: Table, *chosen: str) -> tuple[str, ...]:
    """The columns of the table besides `chosen`: what a near miss may select instead."""
    return tuple(name for name, _ in table.header if name not in chosen)


def about(scene: Scene, said: Sequence[Said] = (), glue: str = "AND") -> dict[str, Any]:
    """The slots that every template knows."""
    draw, entity, key = scene.draw, scene.main.entity, scene.main.key[1]
    return {
        "noun": entity.noun, "nouns": entity.nouns, "who": entity.who,
        "pronoun": "who" if entity.who == "who" else "which", "key": key.noun, "keys": key.nouns,
        "group": plural(draw, entity, said, glue), "each": singular(draw, entity, said) if said else entity.noun,
        "is": predicate(said, glue), "where": f" {glue.lower()} ".join(part.clause for part in said),
    }  # fmt: skip


def list_columns(columns: Sequence[Column]) -> dict[str, str]:
    """The columns as ``{columns}`` of one thing and ``{plurals}`` of several."""
    plurals = [column.noun if column.noun.startswith("number of") else column.nouns for column in columns]
    return {"columns": listed([column.noun for column in columns]), "plurals": listed(plurals)}


def filtered(scene: Scene, said: Sequence[Said], glue: str = "AND") -> Draft:
    """Key, other columns, all columns or a count of what the conditions leave."""
    draw, table = scene.draw, scene.main
    where = tuple(part.condition for part in said)
    slots = about(scene, said, glue)
    key = table.key[0]
    if glue == "OR" or draw.chance(0.45):
        query = Query(key, table.name, where, glue, others=others(table, key))
        few = len(said) < 3 and draw.chance(0.15)
        return Draft(ask(draw, templates.SELECT_WHERE if few else templates.SELECT_KEY, **slots), query)
    if draw.chance(0.5):
        return Draft(ask(draw, templates.COUNT, **slots), Query("COUNT(*)", table.name, where, glue))
    if draw.chance(0.25):
        return Draft(ask(draw, templates.SELECT_ALL, **slots), Query("*", table.name, where, glue))
    used = [name for name, _ in table.described if any(part.sql.startswith(name + " ") for part in where)]
    free = [pair for pair in table.described if pair[0] not in used]
    chosen = several(draw, free, draw.pick([1, 2]))
    select = ", ".join(name for name, _ in chosen)
    query = Query(select, table.name, where, glue, others=others(table, select))
    slots |= list_columns([column for _, column in chosen])
    return Draft(ask(draw, templates.SELECT_COLUMNS, **slots), query)


def one_condition(scene: Scene) -> Draft:
    """What one condition leaves."""
    return filtered(scene, conditions(scene.draw, scene.main, 1))


def year_condition(scene: Scene) -> Draft:
    """What happened in one year."""
    name, column = one(scene.draw, scene.main.named("year"))
    value = scene.draw.pick(scene.main.values(name))
    return filtered(scene, [say_number(scene.draw, name, column, "eq", value)])


def two_conditions(scene: Scene) -> Draft:
    """What two conditions leave, both of them true."""
    return filtered(scene, conditions(scene.draw, scene.main, 2))


def three_conditions(scene: Scene) -> Draft:
    """What three conditions leave, all of them true."""
    said = conditions(scene.draw, scene.main, 2)
    more = [pair for pair in scene.main.named("cat") if not _mentions(said, pair[0])]
    name, column = one(scene.draw, more)
    values = scene.draw.sample(sorted(set(map(str, scene.main.values(name)))), scene.draw.pick([1, 2, 2]))
    return filtered(scene, [say_category(scene.draw, name, column, values), *said])


def either(scene: Scene) -> Draft:
    """What at least one of two conditions leaves (OR)."""
    return filtered(scene, conditions(scene.draw, scene.main, 2), "OR")


def listed_values(scene: Scene) -> Draft:
    """Rows whose value is one of several (IN)."""
    name, column = one(scene.draw, scene.main.categories)
    values = scene.draw.sample(sorted(set(map(str, scene.main.values(name)))), 2)
    extra = conditions(scene.draw, scene.main, 1, [name]) if scene.draw.chance(0.3) else []
    return filtered(scene, [say_category(scene.draw, name, column, values), *extra])


def excluded_value(scene: Scene) -> Draft:
    """Rows whose value is not a given one."""
    name, column = one(scene.draw, scene.main.categories)
    value = str(scene.draw.pick(scene.main.values(name)))
    extra = conditions(scene.draw, scene.main, 1, [name]) if scene.draw.chance(0.3) else []
    return filtered(scene, [say_category(scene.draw, name, column, [value], negated=True), *extra])


def in_range(scene: Scene) -> Draft:
    """The ends lie between stored values, so that it does not matter whether they count."""
    draw = scene.draw
    name, column = one(draw, scene.main.numbers)
    ordered = sorted(scene.main.values(name), key=float)
    first, last = draw.between(1, 3), draw.between(5, 7)
    low, high = (_gap(ordered, at, column) for at in (first, last))
    extra = conditions(draw, scene.main, 1, [name]) if draw.chance(0.25) else []
    return filtered(scene, [say_number(draw, name, column, "between", low, high), *extra])


def text_pattern(scene: Scene) -> Draft:
    """Rows whose text begins with, ends in or contains something (LIKE)."""
    draw = scene.draw
    name, column = scene.main.key
    value = str(draw.pick(scene.main.values(name)))
    how = draw.pick(["start", "start", "end", "contain"])
    length = draw.pick([1, 1, 2]) if how != "contain" else draw.pick([2, 3])
    at = {"start": 0, "end": len(value) - length, "contain": draw.between(0, max(0, len(value) - length))}[how]
    part = value[at : at + length]
    if " " in part or "'" in part or not part:
        raise NotHere
    return filtered(scene, [say_text(draw, name, column, how, part)])


def whole_columns(scene: Scene) -> Draft:
    """One or more columns of every row."""
    draw, table = scene.draw, scene.main
    chosen = several(draw, table.described, draw.pick([1, 2, 2, 3]))
    select = ", ".join(name for name, _ in chosen)
    slots = about(scene)
    slots |= list_columns([column for _, column in chosen])
    query = Query(select, table.name, others=others(table, select) if len(chosen) == 1 else ())
    return Draft(ask(draw, templates.SELECT_COLUMNS, **slots), query)


def count_everything(scene: Scene) -> Draft:
    """How many rows there are."""
    return Draft(ask(scene.draw, templates.COUNT_EVERYTHING, **about(scene)), Query("COUNT(*)", scene.main.name))


def lookup(scene: Scene) -> Draft:
    """A column of the one row that is named."""
    draw, table = scene.draw, scene.main
    key, _ = table.key
    value = draw.pick(table.values(key))
    where = (Condition(f"{key} = {literal(value)}"),)
    chosen = several(draw, [pair for pair in table.described if pair[0] != key], draw.pick([1, 1, 2]))
    select = ", ".join(name for name, _ in chosen)
    query = Query(select, table.name, where, others=others(table, select))
    spoken = " and ".join(column.noun for _, column in chosen)
    choices = templates.LOOKUP_TWO if len(chosen) > 1 else templates.LOOKUP
    return Draft(ask(draw, choices, **about(scene), column=spoken, columns=spoken, value=value), query)


def _mentions(said: Sequence[Said], name: str) -> bool:
    return any(part.condition.sql.startswith(name + " ") for part in said)


def _gap(ordered: Sequence[Cell], at: int, column: Column) -> Cell:
    """A round number strictly between two neighbours.

    Raises:
        NotHere: there is none.
    """
    low, high = float(ordered[at - 1]), float(ordered[at])
    steps = (0.5, 0.1) if column.kind == "real" else (1000, 500, 100, 50, 10, 5, 1)
    for step in steps:
        value = (low // step + 1) * step
        if low < value < high:
            return round(value, 1) if column.kind == "real" else int(value)
    raise NotHere


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
