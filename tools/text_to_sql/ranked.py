"""Questions about one table that sort, group or use a sub-query."""

from __future__ import annotations

from typing import Any

from tools.text_to_sql import templates
from tools.text_to_sql.aggregates import AGGREGATES
from tools.text_to_sql.content import Scene
from tools.text_to_sql.intents import (
    COUNT_WORDS,
    Example,
    Intent,
    NotApplicable,
    ask,
    base_slots,
    draw_conditions,
    other_columns,
    pick_column,
)
from tools.text_to_sql.query import Condition, Query
from tools.text_to_sql.vocabulary import Column
from tools.text_to_sql.wording import article, expand, literal


def _end(scene: Scene, column: Column) -> tuple[bool, str]:
    """Return whether the question asks for the greatest value, and the superlative."""
    greatest = scene.draw.chance(0.6)
    return greatest, column.superlatives[not greatest]


def _order(scene: Scene, name: str) -> dict[str, Any]:
    return {"order": name, "wrong_orders": tuple(other for other, _ in scene.main.numbers if other != name)}


def top_one(scene: Scene) -> Example:
    """The first row by a column."""
    return _top(scene, 0)


def top_of_group(scene: Scene) -> Example:
    """The first row by a column among those that satisfy a condition."""
    return _top(scene, 1)


def _top(scene: Scene, count: int) -> Example:
    draw, table = scene.draw, scene.main
    name, column = pick_column(draw, table.numbers)
    greatest, superlative = _end(scene, column)
    phrases = draw_conditions(draw, table, count, [name])
    target, described = table.key
    if draw.chance(0.25):
        target, described = pick_column(draw, [pair for pair in table.described if pair[0] not in (name, table.key[0])])
    query = Query(
        target, table.name, tuple(part.condition for part in phrases), descending=greatest, limit=1,
        wrong_selects=other_columns(table, target), **_order(scene, name),
    )  # fmt: skip
    slots = base_slots(scene, phrases)
    after = superlative.startswith("with ")
    if target != table.key[0]:
        slots["superlative"] = f"{slots['each']} {superlative}" if after else f"{superlative} {slots['each']}"
        return Example(ask(draw, templates.TOP_COLUMN, **slots, column=described.noun), query)
    if phrases and (after or draw.chance(0.5)):
        choices: tuple[str, ...] = templates.TOP_OF_GROUP_WITH if after else templates.TOP_OF_GROUP
    else:
        slots["noun"] = slots["each"]
        choices = templates.TOP_WITH if after else templates.TOP
        if phrases:
            choices = choices[2:5]
    return Example(ask(draw, choices, **slots, top=superlative, top_of=superlative.removeprefix("with ")), query)


def top_several(scene: Scene) -> Example:
    """The first few rows by a column."""
    draw, table = scene.draw, scene.main
    name, column = pick_column(draw, table.numbers)
    greatest, superlative = _end(scene, column)
    phrases = draw_conditions(draw, table, draw.pick([0, 0, 0, 1]), [name])
    limit = draw.between(2, 4)
    number = draw.pick([str(limit), COUNT_WORDS[limit]])
    slots = base_slots(scene, phrases)
    if superlative.startswith("with "):
        phrase = f"{number} {slots['group']} {superlative}"
        if phrases:
            phrase = f"{number} {slots['nouns']} {superlative} among {slots['group']}"
    else:
        phrase = f"{number} {superlative} {slots['group']}"
    key = table.key[0]
    query = Query(
        key, table.name, tuple(part.condition for part in phrases), descending=greatest, limit=limit,
        wrong_selects=other_columns(table, key), **_order(scene, name),
    )  # fmt: skip
    return Example(ask(draw, templates.TOP_N, **slots, superlatives=phrase), query)


def second_place(scene: Scene) -> Example:
    """The second row by a column."""
    draw, table = scene.draw, scene.main
    name, column = pick_column(
        draw, [pair for pair in table.numbers if not pair[1].superlatives[0].startswith("with ")]
    )
    greatest, superlative = _end(scene, column)
    if superlative.startswith("with "):
        raise NotApplicable
    offset = draw.pick([1, 1, 2])
    key = table.key[0]
    query = Query(
        key, table.name, descending=greatest, limit=1, offset=offset, wrong_selects=other_columns(table, key),
        **_order(scene, name),
    )  # fmt: skip
    nth = {1: "second", 2: "third"}[offset]
    return Example(ask(draw, templates.SECOND, **base_slots(scene), nth=nth, top=superlative), query)


def everything_sorted(scene: Scene) -> Example:
    """All rows, sorted."""
    return _sorted(scene, 0)


def group_sorted(scene: Scene) -> Example:
    """The rows that satisfy a condition, sorted."""
    return _sorted(scene, 1)


def _sorted(scene: Scene, count: int) -> Example:
    draw, table = scene.draw, scene.main
    name, column = pick_column(draw, [*table.numbers, *table.numbers, table.key])
    phrases = draw_conditions(draw, table, count, [name])
    key = table.key[0]
    descending = column.kind != "key" and draw.chance(0.55)
    query = Query(
        key, table.name, tuple(part.condition for part in phrases), descending=descending,
        wrong_selects=other_columns(table, key), **_order(scene, name),
    )  # fmt: skip
    if column.kind == "key":
        words = draw.pick(["in alphabetical order", "alphabetically", f"by {column.noun} from A to Z"])
        return Example(
            ask(draw, templates.SORTED, **base_slots(scene, phrases), sorted=words, sorted_bare=words), query
        )
    top, bottom = column.superlatives if descending else column.superlatives[::-1]
    high = "latest" if column.kind == "year" else "highest"
    low = "earliest" if column.kind == "year" else "lowest"
    directions = (
        [f"{high} first", "in descending order", f"from {high} to {low}", f"starting with the {high}"]
        if descending
        else [f"{low} first", "in ascending order", f"from {low} to {high}", f"starting with the {low}"]
    )
    bare = f"by {column.noun}, {draw.pick(directions)}"
    forms = [f"sorted {bare}", f"ordered {bare}"]
    if not top.startswith("with ") and not bottom.startswith("with "):
        bare = draw.pick([bare, f"from {top} to {bottom}"])
        forms = [*forms, f"from {top} to {bottom}", f"from {top} to {bottom}", f"with the {top} first"]
    return Example(
        ask(draw, templates.SORTED, **base_slots(scene, phrases), sorted=draw.pick(forms), sorted_bare=bare), query
    )


def _grouping(scene: Scene) -> tuple[str, Column, dict[str, Any]]:
    name, column = pick_column(scene.draw, [pair for pair in scene.main.categories if pair[1].nouns != pair[1].noun])
    return name, column, {"column": column.noun, "columns": column.nouns}


def count_by_group(scene: Scene) -> Example:
    """The number of rows for each value of a column."""
    draw, table = scene.draw, scene.main
    name, _, slots = _grouping(scene)
    phrases = draw_conditions(draw, table, draw.pick([0, 0, 0, 1]), [name])
    query = Query(f"{name}, COUNT(*)", table.name, tuple(part.condition for part in phrases), group=name)
    return Example(ask(draw, templates.GROUP_COUNT, **base_slots(scene, phrases), **slots), query)


def aggregate_by_group(scene: Scene) -> Example:
    """An aggregate for each value of a column."""
    draw, table = scene.draw, scene.main
    name, _, slots = _grouping(scene)
    number, described = pick_column(draw, [pair for pair in table.numbers if pair[1].kind != "year"])
    function = draw.pick(["AVG", "AVG", "MAX", "MIN"] + ["SUM"] * described.additive)
    wrong = tuple(f"{name}, {other}({number})" for other in AGGREGATES if other != function)
    query = Query(f"{name}, {function}({number})", table.name, group=name, wrong_selects=wrong)
    words = {"agg": expand(draw, AGGREGATES[function]), "number": described.noun}
    return Example(ask(draw, templates.GROUP_AGGREGATE, **base_slots(scene), **slots, **words), query)


def having_count(scene: Scene) -> Example:
    """Values that more, or fewer, rows than a number have."""
    draw, table = scene.draw, scene.main
    name, _, slots = _grouping(scene)
    sign, how = draw.pick([(">", "more than"), (">", "more than"), (">=", "at least"), ("<", "fewer than")])
    count = draw.between(2, 4)
    near = {">": (">=",), ">=": (">",), "<": ("<=",)}[sign]
    having = Condition(f"COUNT(*) {sign} {count}", tuple(f"COUNT(*) {other} {count}" for other in near))
    query = Query(name, table.name, group=name, having=having)
    spelled = draw.pick([str(count), COUNT_WORDS[count]])
    return Example(ask(draw, templates.HAVING, **base_slots(scene), **slots, how=how, count=spelled), query)


def having_average(scene: Scene) -> Example:
    """Values whose rows have an average above, or below, a number."""
    draw, table = scene.draw, scene.main
    name, _, slots = _grouping(scene)
    number, described = pick_column(draw, [pair for pair in table.numbers if pair[1].kind != "year"])
    function, word = draw.pick([("AVG", "average")] * 2 + [("SUM", "total")] * described.additive)
    ordered = sorted(table.values(number), key=float)
    value = ordered[draw.between(2, len(ordered) - 3)]
    sign, how = draw.pick([(">", "[above|over]"), ("<", "[below|under]")])
    near = tuple(f"{other} {sign} {value}" for other in (f"MAX({number})", f"MIN({number})"))
    having = Condition(f"{function}({number}) {sign} {value}", near)
    query = Query(name, table.name, group=name, having=having)
    words = {"an_agg": article(word), "agg": word, "number": described.noun, "how": expand(draw, how)}
    return Example(ask(draw, templates.HAVING_AGGREGATE, **base_slots(scene), **slots, **words, value=value), query)


def most_common(scene: Scene) -> Example:
    """The most, or least, frequent value of a column."""
    draw, table = scene.draw, scene.main
    name, _, slots = _grouping(scene)
    most = draw.chance(0.75)
    query = Query(name, table.name, group=name, order="COUNT(*)", descending=most, limit=1)
    words = (
        {"most": "most", "common": "most common", "often": "most often"}
        if most
        else {"most": "fewest", "common": "least common", "often": "least often"}
    )
    return Example(ask(draw, templates.MOST_COMMON, **base_slots(scene), **slots, **words), query)


def against_average(scene: Scene) -> Example:
    """Rows above or below the average of a column (a sub-query)."""
    draw, table = scene.draw, scene.main
    name, column = pick_column(draw, [pair for pair in table.numbers if pair[1].kind != "year"])
    greater = draw.chance(0.7)
    sign = ">" if greater else "<"
    inner = f"(SELECT AVG({name}) FROM {table.name})"
    where = (Condition(f"{name} {sign} {inner}", (f"{name} {'<' if greater else '>'} {inner}",)),)
    slots = base_slots(scene)
    word = expand(draw, "[above|higher than|greater than]" if greater else "[below|lower than|smaller than]")
    slots["comparison_noun"] = draw.pick([
        f"{article(column.noun)} {word} [the |]average", f"{article(column.noun)} {word} the average {column.noun}",
        f"{'an above' if greater else 'a below'}-average {column.noun}",
    ])  # fmt: skip
    key = table.key[0]
    if draw.chance(0.3):
        return Example(ask(draw, templates.COUNT_COMPARED, **slots), Query("COUNT(*)", table.name, where))
    query = Query(key, table.name, where, wrong_selects=other_columns(table, key))
    if column.comparatives and draw.chance(0.6):
        comparative = column.comparatives[not greater].removesuffix(" -")
        slots["comparison"] = f"{comparative} than {draw.pick(['average', 'the average ' + table.entity.noun])}"
        return Example(ask(draw, templates.COMPARED, **slots), query)
    return Example(ask(draw, templates.COMPARED_NOUN, **slots), query)


def against_another(scene: Scene) -> Example:
    """Rows above or below a given row (a sub-query)."""
    draw, table = scene.draw, scene.main
    name, column = pick_column(draw, table.numbers)
    key = table.key[0]
    value = draw.pick(table.values(key))
    greater = draw.chance(0.6)
    inner = f"(SELECT {name} FROM {table.name} WHERE {key} = {literal(value)})"
    sign, *near = (">", ">=", "<") if greater else ("<", "<=", ">")
    where = (Condition(f"{name} {sign} {inner}", tuple(f"{name} {other} {inner}" for other in near)),)
    query = Query(key, table.name, where, wrong_selects=other_columns(table, key))
    slots = base_slots(scene)
    if column.comparatives and draw.chance(0.75):
        slots["comparison"] = f"{column.comparatives[not greater].removesuffix(' -')} than {value}"
        return Example(ask(draw, templates.COMPARED, **slots), query)
    words = ("later", "earlier") if column.kind == "year" else ("higher", "lower")
    slots["comparison_noun"] = f"{article(words[not greater])} {column.noun} than {value}"
    return Example(ask(draw, templates.COMPARED_NOUN, **slots), query)


RANKED: tuple[tuple[Intent, str, int], ...] = (
    (top_one, "easy", 7),
    (everything_sorted, "easy", 4),
    (top_of_group, "medium", 4),
    (top_several, "medium", 5),
    (second_place, "medium", 2),
    (group_sorted, "medium", 3),
    (count_by_group, "medium", 6),
    (aggregate_by_group, "medium", 5),
    (having_count, "hard", 6),
    (having_average, "hard", 3),
    (most_common, "hard", 4),
    (against_average, "hard", 6),
    (against_another, "hard", 4),
)
"""Intent, difficulty, weight."""
