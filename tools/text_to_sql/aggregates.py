"""Questions about one table with aggregate functions or DISTINCT."""

from __future__ import annotations

from tools.text_to_sql import templates
from tools.text_to_sql.content import Scene, Table
from tools.text_to_sql.draw import Draw
from tools.text_to_sql.intents import Example, Intent, ask, base_slots, draw_conditions, other_columns, pick_column
from tools.text_to_sql.query import Query
from tools.text_to_sql.vocabulary import Column
from tools.text_to_sql.wording import expand

AGGREGATES = {
    "AVG": "[average|mean|average]",
    "SUM": "[total|combined|total]",
    "MAX": "[highest|maximum|greatest]",
    "MIN": "[lowest|minimum|smallest]",
}
YEARS = {"MAX": "[latest|most recent]", "MIN": "[earliest|first]"}


def _aggregate(draw: Draw, column: Column) -> tuple[str, str]:
    """Return an aggregate function that makes sense for the column, and its name in English."""
    if column.kind == "year":
        name = draw.pick(["MAX", "MIN"])
        return name, expand(draw, YEARS[name])
    name = draw.pick(["AVG", "AVG", "MAX", "MIN", "SUM"] if column.additive else ["AVG", "AVG", "MAX", "MIN"])
    return name, expand(draw, AGGREGATES[name])


def _other_aggregates(table: Table, function: str, name: str) -> tuple[str, ...]:
    wrong = [f"{other}({name})" for other in AGGREGATES if other != function]
    return (*wrong, *(f"{function}({other})" for other, _ in table.numbers if other != name))


def aggregate(scene: Scene) -> Example:
    """SUM, AVG, MIN or MAX of a column over the whole table."""
    return _aggregated(scene, 0)


def filtered_aggregate(scene: Scene) -> Example:
    """SUM, AVG, MIN or MAX of a column over the rows that satisfy conditions."""
    return _aggregated(scene, scene.draw.pick([1, 1, 1, 2]))


def _aggregated(scene: Scene, count: int) -> Example:
    draw, table = scene.draw, scene.main
    name, column = pick_column(draw, table.numbers)
    phrases = draw_conditions(draw, table, count, [name])
    function, words = _aggregate(draw, column)
    where = tuple(part.condition for part in phrases)
    query = Query(f"{function}({name})", table.name, where, wrong_selects=_other_aggregates(table, function, name))
    slots = base_slots(scene, phrases)
    if not phrases:
        slots["group"] = draw.pick(["all ", "the ", "all the ", "all "]) + scene.main.entity.nouns
    return Example(ask(draw, templates.AGGREGATE, **slots, agg=words, column=column.noun), query)


def two_aggregates(scene: Scene) -> Example:
    """Two aggregates of one column in one question."""
    draw, table = scene.draw, scene.main
    name, column = pick_column(draw, table.numbers)
    phrases = draw_conditions(draw, table, draw.pick([0, 1]), [name])
    first, second = draw.pick([("MIN", "MAX"), ("MAX", "MIN")] + [("AVG", "MAX")] * (column.kind != "year"))
    names = YEARS if column.kind == "year" else AGGREGATES
    query = Query(f"{first}({name}), {second}({name})", table.name, tuple(part.condition for part in phrases))
    slots = base_slots(scene, phrases)
    style = draw.below(3)
    words = {
        slot: names[function].strip("[]").split("|")[style % len(names[function].split("|"))]
        for slot, function in (("agg", first), ("agg2", second))
    }
    return Example(ask(draw, templates.TWO_AGGREGATES, **slots, **words, column=column.noun), query)


def distinct_values(scene: Scene) -> Example:
    """The distinct values of a column."""
    name, column = pick_column(scene.draw, [pair for pair in scene.main.categories if pair[1].nouns != pair[1].noun])
    query = Query(name, scene.main.name, distinct=True, wrong_selects=other_columns(scene.main, name))
    return Example(
        ask(scene.draw, templates.DISTINCT, **base_slots(scene), column=column.noun, columns=column.nouns), query
    )


def count_distinct(scene: Scene) -> Example:
    """The number of distinct values of a column."""
    draw, table = scene.draw, scene.main
    name, column = pick_column(draw, [pair for pair in table.categories if pair[1].nouns != pair[1].noun])
    phrases = draw_conditions(draw, table, draw.pick([0, 0, 1]), [name])
    where = tuple(part.condition for part in phrases)
    wrong = (f"COUNT({name})", *(f"COUNT(DISTINCT {other})" for other in other_columns(table, name)))
    query = Query(f"COUNT(DISTINCT {name})", table.name, where, wrong_selects=wrong)
    slots = base_slots(scene, phrases)
    if not phrases:
        slots["group"] = "the " + table.entity.nouns
    return Example(ask(draw, templates.COUNT_DISTINCT, **slots, columns=column.nouns), query)


AGGREGATED: tuple[tuple[Intent, str, int], ...] = (
    (aggregate, "easy", 7),
    (distinct_values, "easy", 4),
    (filtered_aggregate, "medium", 6),
    (two_aggregates, "medium", 2),
    (count_distinct, "medium", 3),
)
"""Intent, difficulty, weight."""
