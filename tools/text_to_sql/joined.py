"""Questions about two tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.text_to_sql import templates
from tools.text_to_sql.aggregates import AGGREGATES
from tools.text_to_sql.content import Scene, Table
from tools.text_to_sql.intents import Draft, Intent, about, ask, list_columns, one, several
from tools.text_to_sql.query import Condition, Query
from tools.text_to_sql.vocabulary import Link
from tools.text_to_sql.wording import (
    Said,
    article,
    condition_on,
    expand,
    literal,
    plural,
    predicate,
    singular,
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Both tables of a scene, none of them missing."""

    scene: Scene
    main: Table
    child: Table
    link: Link

    @property
    def on(self) -> str:
        return f"{self.child.name}.{self.scene.foreign_key} = {self.main.name}.id"

    def join(self, first: Table) -> str:
        second = self.child if first is self.main else self.main
        return f"{first.name} JOIN {second.name} ON {self.on}"

    def condition(self, table: Table, spared: str = "") -> Said:
        usable = [pair for pair in table.described if pair[1].kind != "key" and pair[0] != spared]
        return condition_on(self.scene.draw, table, *one(self.scene.draw, usable), prefix=f"{table.name}.")

    def columns(self, table: Table) -> tuple[str, ...]:
        return tuple(f"{table.name}.{name}" for name, _ in table.header)


def pair_of(scene: Scene) -> Pair:
    """The two tables of the scene and the columns that join them."""
    assert scene.child is not None and scene.link is not None
    return Pair(scene, scene.main, scene.child, scene.link)


def _parent(pair: Pair, described: bool) -> tuple[str, Condition]:
    """Which parents are meant, in words and in SQL: one by name, or those that a condition leaves."""
    draw, main = pair.scene.draw, pair.main
    if described:
        said = pair.condition(main)
        return plural(draw, main.entity, [said]), said.condition
    key = main.key[0]
    value = draw.pick(main.values(key))
    spoken = draw.pick([str(value), f"the {main.entity.noun} {value}"])
    return spoken, Condition(f"{main.name}.{key} = {literal(value)}")


def children_of_one(scene: Scene) -> Draft:
    """Rows of the second table that belong to a named row of the first."""
    return _children(scene, described=False)


def children_of_some(scene: Scene) -> Draft:
    """Rows of the second table whose parents fulfil a condition."""
    return _children(scene, described=True)


def _children(scene: Scene, described: bool) -> Draft:
    """A column or two of the child rows of a parent, at times with a condition on the children too."""
    pair, draw = pair_of(scene), scene.draw
    child = pair.child
    parent, condition = _parent(pair, described)
    chosen = several(draw, child.described, draw.pick([1, 1, 2]))
    extra = [pair.condition(child, chosen[0][0])] if len(chosen) == 1 and not described and draw.chance(0.25) else []
    select = ", ".join(f"{child.name}.{name}" for name, _ in chosen)
    wrong = tuple(name for name in pair.columns(child) if name != select)
    query = Query(
        select, pair.join(child), (condition, *(said.condition for said in extra)),
        others=wrong if len(chosen) == 1 else (),
    )  # fmt: skip
    group = f"{child.entity.nouns} {pair.link.relation} {parent}"
    if extra:
        group += f" that {predicate(extra)}"
    choices = (
        "{show} the {plurals} of [all|the|] {group}.",
        "What are the {plurals} of [the|all] {group}?",
        "{plurals} of {group}",
        "For [all|the] {group}, {showlow} the {plurals}.",
    )
    return Draft(ask(draw, choices, group=group, **list_columns([column for _, column in chosen])), query)


def count_children_of_one(scene: Scene) -> Draft:
    """How many rows belong to a named one."""
    return _counted(scene, described=False)


def count_children_of_some(scene: Scene) -> Draft:
    """How many rows belong to those that fulfil a condition."""
    return _counted(scene, described=True)


def _counted(scene: Scene, described: bool) -> Draft:
    pair, draw = pair_of(scene), scene.draw
    parent, condition = _parent(pair, described)
    group = f"{pair.child.entity.nouns} {pair.link.relation} {parent}"
    query = Query("COUNT(*)", pair.join(pair.child), (condition,))
    choices = (
        "How many {group} are there?",
        "Count the {group}.",
        "[number|count] of {group}",
        "What is the number of {group}?",
        "How many {group} do we have?",
    )
    return Draft(ask(draw, choices, group=group), query)


def aggregate_children(scene: Scene) -> Draft:
    """An aggregate over the rows that belong to a named one."""
    pair, draw = pair_of(scene), scene.draw
    child = pair.child
    name, column = one(draw, [found for found in child.numbers if found[1].kind != "year"])
    parent, condition = _parent(pair, draw.chance(0.5))
    function = draw.pick(["AVG", "MAX", "MIN"] + ["SUM", "SUM"] * column.additive)
    wrong = tuple(f"{other}({child.name}.{name})" for other in AGGREGATES if other != function)
    query = Query(f"{function}({child.name}.{name})", pair.join(child), (condition,), others=wrong)
    group = f"{child.entity.nouns} {pair.link.relation} {parent}"
    words = expand(draw, AGGREGATES[function])
    return Draft(ask(draw, templates.AGGREGATE, group=f"the {group}", agg=words, column=column.noun), query)


def parents_with_child(scene: Scene) -> Draft:
    """A telling row has at most one such child a parent: whether repeats count cannot matter."""
    pair, draw = pair_of(scene), scene.draw
    said = pair.condition(pair.child)
    key = f"{pair.main.name}.{pair.main.key[0]}"
    query = Query(
        key, pair.join(pair.main), (said.condition,), others=pair.columns(pair.child), same=(f"DISTINCT {key}",)
    )
    slots = about(scene)
    slots["child"] = article(singular(draw, pair.child.entity, [said]))
    return Draft(ask(draw, templates.PARENT_WHERE_CHILD, **slots, verb=pair.link.verb), query)


def both_tables(scene: Scene) -> Draft:
    """A column of each table, joined."""
    pair, draw = pair_of(scene), scene.draw
    name, column = one(draw, pair.child.described)
    key = f"{pair.main.name}.{pair.main.key[0]}"
    query = Query(f"{pair.child.name}.{name}, {key}", pair.join(pair.child))
    slots = _family(pair)
    return Draft(ask(draw, templates.BOTH, **slots, column=column.noun, columns=column.nouns), query)


def count_per_parent(scene: Scene) -> Draft:
    """How many rows belong to each row of the first table."""
    pair = pair_of(scene)
    key = f"{pair.main.name}.{pair.main.key[0]}"
    query = Query(f"{key}, COUNT(*)", pair.join(pair.main), group=key)
    return Draft(ask(scene.draw, templates.PER_PARENT, **_family(pair)), query)


def most_children(scene: Scene) -> Draft:
    """The row to which most others belong."""
    pair = pair_of(scene)
    key = f"{pair.main.name}.{pair.main.key[0]}"
    query = Query(key, pair.join(pair.main), group=key, order="COUNT(*)", descending=True, limit=1)
    return Draft(ask(scene.draw, templates.MOST_CHILDREN, **_family(pair), most="most"), query)


def childless(scene: Scene) -> Draft:
    """Rows to which none belongs."""
    pair, key = pair_of(scene), scene.main.key[0]
    inner = f"(SELECT {scene.foreign_key} FROM {pair.child.name})"
    where = (Condition(f"id NOT IN {inner}", (f"id IN {inner}",)),)
    return Draft(ask(scene.draw, templates.CHILDLESS, **_family(pair)), Query(key, pair.main.name, where))


def _family(pair: Pair) -> dict[str, Any]:
    child = pair.child.entity
    return {**about(pair.scene), "child": child.noun, "children": child.nouns, "verb": pair.link.verb}


JOINED: tuple[tuple[Intent, str, int, bool], ...] = (
    (children_of_one, "hard", 9, True),
    (children_of_some, "hard", 7, True),
    (count_children_of_one, "hard", 7, True),
    (count_children_of_some, "hard", 5, True),
    (aggregate_children, "hard", 7, True),
    (parents_with_child, "hard", 7, True),
    (both_tables, "hard", 4, True),
    (count_per_parent, "hard", 5, True),
    (most_children, "hard", 5, True),
    (childless, "hard", 5, False),
)
"""Intent, difficulty, weight, whether every parent needs a child."""
